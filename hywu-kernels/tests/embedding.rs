//! Table lookup against the oracle, forward and backward.

use hywu_kernels::{
    Tape, Tensor, Var,
    ops::{embedding::embedding, loss::weighted_sum},
    testing::{Place, check_gradients, for_each_place, random, widen},
};

#[test]
fn lookup() {
    let ids = [3, 0, 3, 1];
    let rows = |v: &[Vec<f64>]| ids.iter().flat_map(|&i| v[0][i as usize * 5..][..5].to_vec()).collect();
    check_gradients(&[random(1, &[4, 5])], |t, v| embedding(t, &v[0], &ids, &[2, 2]), rows, 20, 1e-5);
    let table = Var::constant(random(1, &[4, 5]));
    assert!(
        embedding(&Tape::inference(), &table, &[4], &[1])
            .expect_err("no such entry")
            .to_string()
            .contains('4')
    );
}

/// The lookup and the table's gradient for random weights of the output.
fn both(place: Place, table: &Tensor, ids: &[u32], weights: &Tensor) -> [Tensor; 2] {
    let tape = Tape::new();
    let table = tape.leaf(place.tensor(table));
    let out = embedding(&tape, &table, ids, &[ids.len()]).expect("good ids");
    let loss = weighted_sum(&tape, &out, &place.tensor(weights)).expect("one shape");
    let grad = tape.backward(&loss).expect("a scalar").take(&table).expect("a leaf");
    [out.value(), &grad].map(|t| t.to_host().expect("the device works"))
}

/// Some ids at very many positions, some at one, some at none: exact copies, and sums of each id's rows in a fixed order.
#[test]
fn ids_may_be_rare_or_frequent() {
    const ENTRIES: usize = 50;
    for_each_place(|place| {
        for width in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 520] {
            let ids: Vec<u32> = (0..700).map(|i| if i % 3 == 0 { 7 } else { i * i % 43 + 2 }).collect();
            let (table, weights) = (random(1, &[ENTRIES, width]), random(2, &[ids.len(), width]));
            let [out, grad] = both(place, &table, &ids, &weights);
            let (held, w) = (place.rounded(&table), place.rounded(&weights));
            let row = |id: u32| &held[id as usize * width..][..width];
            assert_eq!(widen(&out), ids.iter().flat_map(|&id| row(id).to_vec()).collect::<Vec<_>>());
            let mut sums = vec![0.0; ENTRIES * width];
            // What a sum may be off by: one rounding of the result, and those of the sum.
            let mut sizes = vec![0.0; ENTRIES * width];
            for (&id, w) in ids.iter().zip(w.chunks(width)) {
                for (i, w) in w.iter().enumerate() {
                    sums[id as usize * width + i] += w;
                    sizes[id as usize * width + i] += w.abs();
                }
            }
            let rounding = if place.dtype.size() == 2 { 1.0 / 256.0 } else { 1e-7 };
            for (i, (got, sum)) in widen(&grad).iter().zip(&sums).enumerate() {
                let bound = sum.abs() * rounding + sizes[i] * 1e-5;
                assert!(
                    (got - sum).abs() <= bound,
                    "at {place:?}, width {width}, {i}: {got}, expected {sum}"
                );
            }
            let [out2, grad2] = both(place, &table, &ids, &weights);
            assert_eq!((out.data(), grad.data()), (out2.data(), grad2.data()));
        }
    });
}

#[test]
fn no_ids_and_no_width() {
    for_each_place(|place| {
        let [out, grad] = both(place, &random(1, &[3, 4]), &[], &Tensor::zeros(&[0, 4]));
        assert_eq!((out.shape(), grad.data()), (&[0, 4][..], &[0.0; 12][..]));
        let [out, grad] = both(place, &Tensor::zeros(&[3, 0]), &[1, 2], &Tensor::zeros(&[2, 0]));
        assert_eq!((out.shape(), grad.shape()), (&[2, 0][..], &[3, 0][..]));
    });
}
