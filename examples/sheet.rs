use valor::rooms::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let look = if a[1] == "s" { Look::Studio } else { Look::LivedIn };
    let (s0, cols, rows, w): (u64, u32, u32, u32) =
        (a[2].parse().unwrap(), a[3].parse().unwrap(), a[4].parse().unwrap(), a[5].parse().unwrap());
    let h = w * 3 / 4;
    let mut img = image::RgbImage::new(cols * w, rows * h);
    for i in 0..cols * rows {
        let v = generate(s0 + i as u64, look, w, h);
        for y in 0..h {
            for x in 0..w {
                let k = ((y * w + x) * 3) as usize;
                img.put_pixel(
                    (i % cols) * w + x,
                    (i / cols) * h + y,
                    image::Rgb([v.rgb[k], v.rgb[k + 1], v.rgb[k + 2]]),
                );
            }
        }
    }
    img.save(&a[6]).unwrap();
    let n = 300u64;
    let t = std::time::Instant::now();
    let vs: Vec<View> = (0..n).map(|s| generate(s, look, 256, 192)).collect();
    println!("{:.1} pictures/s", n as f64 / t.elapsed().as_secs_f64());
    let things: Vec<&Thing> = vs.iter().flat_map(|v| &v.things).collect();
    let t = things.len() as f64;
    let share = |f: &dyn Fn(&Thing) -> bool| things.iter().filter(|t| f(t)).count() as f64 / t;
    println!("things {:.2} clear {:.2}", t / n as f64, share(&|t| t.is_clear()));
    println!(
        "occluded>.2 {:.3} unclear-fraction<.25 {:.3}",
        share(&|t| t.visible_fraction < 0.8),
        share(&|t| t.visible_fraction < 0.25)
    );
    println!("small {:.3}", share(&|t| t.bbox[2] - t.bbox[0] < 25.6 || t.bbox[3] - t.bbox[1] < 19.2));
    println!(
        "clear only: occl {:.3} small {:.3}",
        things.iter().filter(|t| t.is_clear() && t.visible_fraction < 0.8).count() as f64
            / things.iter().filter(|t| t.is_clear()).count() as f64,
        0.
    );
    println!("truncated {:.3}", share(&|t| t.truncated));
    for k in Kind::ALL {
        print!("{k} {:.2}  ", things.iter().filter(|t| t.kind == *k).count() as f64 / n as f64);
    }
    println!();
    let min = vs.iter().map(|v| v.things.len()).min().unwrap();
    let max = vs.iter().map(|v| v.things.len()).max().unwrap();
    println!(
        "min {min} max {max}; fov {:?}",
        vs.iter().map(|v| v.camera.tilt as i32).take(20).collect::<Vec<_>>()
    );
}
