//! Blending of tiles.

use hywu_kernels::{
    ops::tile_blend::{TileAt, tile_blend},
    testing::random,
};

#[test]
fn blended_tiles_of_one_picture_are_that_picture() {
    let (h, w, size) = (20, 25, 8);
    let picture = random(1, &[h, w, 3]);
    let starts = |n: usize| (0..n - size).step_by(5).chain([n - size]).collect::<Vec<_>>();
    let at: Vec<TileAt> =
        starts(h).iter().flat_map(|&y| starts(w).into_iter().map(move |x| TileAt { y, x })).collect();
    let mut tiles = Vec::new();
    for t in &at {
        for y in t.y..t.y + size {
            tiles.extend_from_slice(&picture.data()[(y * w + t.x) * 3..][..size * 3]);
        }
    }
    let mut out = vec![f32::NAN; h * w * 3];
    tile_blend(&tiles, &at, size, 3, &mut out, h, w).expect("covered");
    let worst = out.iter().zip(picture.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
    let e = tile_blend(&tiles[..192], &at[..1], size, 3, &mut out, h, w)
        .expect_err("mostly uncovered")
        .to_string();
    assert!(e.contains("covers"), "{e}");
    assert!(tile_blend(&tiles[..192], &[TileAt { y: 13, x: 0 }], size, 3, &mut out, h, w).is_err());
}
