//! Where an adapter meets a backbone: nothing may get lost between them without a word.

use hywu_core::{Adapter, AdapterSpec, ApplyResult, Lora, Module};
use ndarray::ArrayD;
use proptest::prelude::*;

fn spec(layers: usize) -> AdapterSpec {
    let module = |path: &str, experts| Module { path: path.into(), in_dim: 3, out_dim: 5, experts };
    let modules = vec![module("q", None), module("experts.w1", Some(2))];
    AdapterSpec { prefix: "layers.".into(), layers, rank: 2, alpha: 2.0, modules }
}

/// Fits `spec`, in `batch` instances of rank 2.
fn adapter(spec: &AdapterSpec, batch: usize) -> Adapter {
    let pair = |(name, module): (String, &Module)| {
        let array = |matrix: [usize; 2]| {
            let shape: Vec<usize> = [batch].into_iter().chain(module.experts).chain(matrix).collect();
            ArrayD::from_elem(shape, 0.5)
        };
        (name, Lora { lora_a: array([2, module.in_dim]), lora_b: array([module.out_dim, 2]) })
    };
    Adapter { modules: spec.named_modules().map(pair).collect(), scale: 1.0, metadata: Default::default() }
}

fn refused(adapter: &Adapter, spec: &AdapterSpec) -> String {
    adapter.check(spec).expect_err("it does not fit").to_string()
}

#[test]
fn a_whole_adapter_is_applied() {
    let spec = spec(3);
    let found = adapter(&spec, 2).cover(&spec).expect("it fits");
    assert_eq!(found.applied, spec.module_names().collect::<Vec<_>>());
    assert!(found.is_complete() && found.skipped.is_empty());
    found.strict().expect("complete");
    assert_eq!(found.to_string(), "6 of 6 modules have an entry");
}

#[test]
fn ten_names_of_each_side_are_told_and_how_many_more() {
    let (small, large) = (spec(1), spec(7));
    let missing = refused(&adapter(&small, 1), &large);
    for told in ["2 of 14 modules", "missing modules: `layers.1.q`, ", "`layers.5.experts.w1` and 2 more"] {
        assert!(missing.contains(told), "{told}: {missing}");
    }
    assert!(
        !missing.contains("unused") && !missing.contains("layers.6") && !missing.contains('\n'),
        "{missing}"
    );
    let unused = refused(&adapter(&large, 1), &small);
    for told in ["2 of 2 modules", "unused entries: `layers.1.q`, ", "`layers.5.experts.w1` and 2 more"] {
        assert!(unused.contains(told), "{told}: {unused}");
    }
    assert!(!unused.contains("missing") && !unused.contains("layers.6"), "{unused}");
    // Exactly ten: all are told.
    let ten = refused(&adapter(&spec(6), 1), &spec(1));
    assert!(ten.ends_with("`layers.5.experts.w1`"), "{ten}");
}

#[test]
fn an_adapter_of_which_nothing_fits_is_not_even_partial() {
    let spec = spec(2);
    let mut other = adapter(&spec, 1);
    other.modules = other.modules.into_iter().map(|(name, pair)| (format!("blocks.{name}"), pair)).collect();
    let found = other.cover(&spec).expect("nothing meets, so nothing is of a wrong shape");
    assert_eq!((found.applied.len(), found.missing.len(), found.unused.len()), (0, 4, 4));
    assert!(found.partial().expect_err("nothing fits").to_string().contains("blocks.layers.0.q"));
    other.modules.extend(adapter(&spec, 1).modules.into_iter().take(1));
    other.cover(&spec).expect("it fits").partial().expect("something fits");
}

#[test]
fn what_meets_must_have_the_right_shape_and_finite_values() {
    let spec = spec(2);
    let shaped = |name: &str, a: &[usize], b: &[usize]| {
        let mut adapter = adapter(&spec, 1);
        adapter.modules[name] = Lora { lora_a: ArrayD::zeros(a), lora_b: ArrayD::zeros(b) };
        adapter.cover(&spec).map(|_| ()).map_err(|e| e.to_string())
    };
    // Any rank will do.
    shaped("layers.1.q", &[1, 7, 3], &[1, 5, 7]).expect("rank 7");
    for (name, a, b, expected) in [
        ("layers.1.q", &[1, 2, 4][..], &[1, 5, 2][..], "[1, r, 3] and [1, 5, r]"),
        ("layers.1.q", &[1, 2, 3], &[1, 2, 5], "[1, r, 3] and [1, 5, r]"),
        ("layers.1.q", &[1, 2, 3], &[1, 5, 3], "[1, r, 3] and [1, 5, r]"),
        ("layers.1.q", &[2, 2, 3], &[2, 5, 2], "[1, r, 3] and [1, 5, r]"),
        ("layers.1.q", &[1, 0, 3], &[1, 5, 0], "[1, r, 3] and [1, 5, r]"),
        ("layers.1.q", &[3], &[5], "[1, r, 3] and [1, 5, r]"),
        ("layers.0.experts.w1", &[1, 2, 3], &[1, 5, 2], "[1, 2, r, 3] and [1, 2, 5, r]"),
        ("layers.0.experts.w1", &[1, 3, 2, 3], &[1, 3, 5, 2], "[1, 2, r, 3] and [1, 2, 5, r]"),
    ] {
        let e = shaped(name, a, b).expect_err("the wrong shape");
        assert!(e.contains(name) && e.contains(&format!("{a:?}")) && e.contains(expected), "{e}");
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut spoiled = adapter(&spec, 1);
        spoiled.modules["layers.1.q"].lora_b[[0, 4, 1]] = bad;
        let e = refused(&spoiled, &spec);
        assert!(e.contains("layers.1.q") && e.contains(&bad.to_string()), "{e}");
        let scaled = Adapter { scale: bad, ..adapter(&spec, 1) };
        assert!(refused(&scaled, &spec).contains("scale"));
    }
}

proptest! {
    /// Every module and every entry is in exactly one place, and only what is in both is applied.
    #[test]
    fn no_name_gets_lost(modules in prop::collection::hash_set("[a-f]", 0..6), entries in prop::collection::hash_set("[a-f]", 0..6), skipped in prop::collection::hash_set("[a-f]", 0..6)) {
        let found = ApplyResult::of(modules.iter().cloned(), entries.iter().map(String::as_str), |m| skipped.contains(m));
        let mut sides = [found.applied.clone(), found.skipped.clone(), found.missing.clone()].concat();
        sides.sort();
        let mut all: Vec<String> = modules.iter().cloned().collect();
        all.sort();
        prop_assert_eq!(sides, all);
        prop_assert_eq!(found.applied.len() + found.unused.len(), entries.len());
        prop_assert!(found.applied.iter().all(|n| entries.contains(n)));
        prop_assert!(found.unused.iter().all(|n| entries.contains(n) && !modules.contains(n)));
        prop_assert!(found.skipped.iter().all(|n| skipped.contains(n) && !entries.contains(n)));
        prop_assert!(found.missing.iter().all(|n| !skipped.contains(n) && !entries.contains(n)));
        prop_assert_eq!(found.is_complete(), found.strict().is_ok());
    }
}
