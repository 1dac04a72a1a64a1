//! Programs per second through one worker that is up: `cargo bench --bench sandbox`. On a machine with
//! other work the wall time says little, so the processor time of both processes is printed too.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use valor::program::{Limits, Sandbox};
use valor::tools::stub::StubTools;

const PROGRAMS: [(&str, &str); 3] = [
    ("arithmetic", "final_answer = sum(x * x for x in range(10))\n"),
    (
        "two tools",
        "chairs = gd_detect(img_pth, 'chair')\nif not chairs:\n    final_answer = 'none'\n    return\n\
         c = chairs[0]['bbox']\nfinal_answer = (c[3] - c[1]) * depth(img_pth, c)\n",
    ),
    (
        "numpy",
        "import numpy as np\nboxes = np.array([c['bbox'] for c in gd_detect(img_pth, 'chair, table')])\n\
         w = boxes[:, 2] - boxes[:, 0]\nfinal_answer = float(np.mean(w))\n",
    ),
];

/// Processor time so far of this process and of the worker, where /proc tells it (in steps of 10 ms).
fn processor_seconds(worker: u32) -> Option<f64> {
    let of = |path: String| {
        let stat = std::fs::read_to_string(path).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.)
    };
    Some(of("/proc/self/stat".to_owned())? + of(format!("/proc/{worker}/stat"))?)
}

fn programs(c: &mut Criterion) {
    let mut sandbox =
        Sandbox::with_executable(Limits::default(), env!("CARGO_BIN_EXE_valor")).expect("a worker");
    let mut group = c.benchmark_group("sandbox");
    group.throughput(Throughput::Elements(1));
    for (name, source) in PROGRAMS {
        let worker = sandbox.worker_id().expect("a worker waits");
        let (before, n) = (processor_seconds(worker), 500);
        for _ in 0..n {
            sandbox.run(source, "a.png", &mut StubTools);
        }
        if let (Some(before), Some(after)) = (before, processor_seconds(worker)) {
            println!("{name}: {:.0} programs per second and core", f64::from(n) / (after - before));
        }
    }
    for (name, source) in PROGRAMS {
        assert!(sandbox.run(source, "a.png", &mut StubTools).result.is_ok(), "{name}");
        group.bench_function(name, |b| b.iter(|| sandbox.run(source, "a.png", &mut StubTools)));
    }
    group.finish();
}

criterion_group!(benches, programs);
criterion_main!(benches);
