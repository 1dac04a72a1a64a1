//! Programs per second through one worker that is up: `cargo bench --bench sandbox`.

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

fn programs(c: &mut Criterion) {
    let mut sandbox =
        Sandbox::with_executable(Limits::default(), env!("CARGO_BIN_EXE_valor")).expect("a worker");
    let mut group = c.benchmark_group("sandbox");
    group.throughput(Throughput::Elements(1));
    for (name, source) in PROGRAMS {
        assert!(sandbox.run(source, "a.png", &mut StubTools).result.is_ok(), "{name}");
        group.bench_function(name, |b| b.iter(|| sandbox.run(source, "a.png", &mut StubTools)));
    }
    group.finish();
}

criterion_group!(benches, programs);
criterion_main!(benches);
