//! Compiles `kernels.cu` to PTX with nvcc where the `cuda` feature is on; else there is nothing to do.

fn main() {
    println!("cargo:rerun-if-changed=src/nn/kernels/kernels.cu");
    println!("cargo:rerun-if-changed=src/nn/kernels/build.rs");
    #[cfg(feature = "cuda")]
    ptx();
}

#[cfg(feature = "cuda")]
fn ptx() {
    // The same tool, flags and choice of architecture (CUDA_COMPUTE_CAP, else the GPU's) as candle's kernels.
    cudaforge::KernelBuilder::new()
        .source_files(["src/nn/kernels/kernels.cu"])
        .arg("--expt-relaxed-constexpr")
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()
        .expect("nvcc could not compile src/nn/kernels/kernels.cu");
}
