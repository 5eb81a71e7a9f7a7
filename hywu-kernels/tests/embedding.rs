//! Table lookup against the oracle, forward and backward.

use hywu_kernels::{
    Tape, Var,
    ops::embedding::embedding,
    testing::{check_gradients, random},
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
