//! How far two adapters are from each other.

use super::{
    Adapter, Matrices,
    low_rank::{Sum, inner},
};
use crate::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;

/// Two adapters side by side. Norms are Frobenius norms of scale B A.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Norm of the first, over all its modules.
    pub norm_a: f64,
    /// Norm of the second, over all its modules.
    pub norm_b: f64,
    /// Norm of the difference; a module that one of them lacks counts as zero there.
    pub distance: f64,
    /// Cosine between the two updates; none when one is zero.
    pub cosine: Option<f64>,
    /// The modules that both have, in the order of the first.
    pub modules: Vec<ModuleComparison>,
    /// Modules of the first alone.
    pub only_a: Vec<String>,
    /// Modules of the second alone.
    pub only_b: Vec<String>,
}

/// One module of both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleComparison {
    /// Its name.
    pub name: String,
    /// Norm in the first adapter, over all experts.
    pub norm_a: f64,
    /// Norm in the second.
    pub norm_b: f64,
    /// Norm of the difference.
    pub distance: f64,
    /// Cosine; none when one is zero.
    pub cosine: Option<f64>,
}

/// Sums over some modules.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// ||x||^2, ||y||^2, ||x - y||^2, <x, y>.
    squares: [f64; 4],
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.squares.iter_mut().zip(other.squares).for_each(|(x, y)| *x += y);
    }
    /// norm_a, norm_b, distance, cosine.
    fn finish(&self) -> (f64, f64, f64, Option<f64>) {
        let [x, y, difference, product] = self.squares;
        let cosine = (x > 0.0 && y > 0.0).then(|| (product / (x.sqrt() * y.sqrt())).clamp(-1.0, 1.0));
        (x.sqrt(), y.sqrt(), difference.sqrt(), cosine)
    }
}

/// A module's pairs with the scale; empty when there is no such module.
fn side<'a>(adapter: &'a Adapter, name: &str, instance: usize) -> Vec<(f64, Matrices<'a>)> {
    let pairs = adapter.modules.get(name).map(|lora| lora.matrices(instance)).unwrap_or_default();
    pairs.into_iter().map(|pair| (f64::from(adapter.scale), pair)).collect()
}

/// Compares instance `i` of `a` with instance `j` of `b`, for `instances` = (i, j). Ranks and scales may differ.
///
/// # Errors
/// Those of [`Adapter::check_pairs`]; [`Error::Adapter`] when an instance is not there or a module has not the same widths and
/// experts in both.
pub fn compare(a: &Adapter, b: &Adapter, instances: (usize, usize)) -> Result<Comparison> {
    a.check_instance(instances.0)?;
    b.check_instance(instances.1)?;
    let sums = |name: &String| -> Result<(String, Sums)> {
        let (x, y) = (side(a, name, instances.0), side(b, name, instances.1));
        let mut sums = Sums::default();
        if x.is_empty() || y.is_empty() {
            let square = |terms: &[_]| terms.iter().map(|&t| Sum::new(&[t]).norm().powi(2)).sum::<f64>();
            let (x, y) = (square(&x), square(&y));
            return Ok((name.clone(), Sums { squares: [x, y, x + y, 0.0] }));
        }
        let shape = |side: &[(f64, Matrices<'_>)]| (side.len(), side[0].1.b.nrows(), side[0].1.a.ncols());
        if shape(&x) != shape(&y) {
            let what = format!(
                "`{name}` is not the same module in both: (experts, out, in) is {:?} and {:?}",
                shape(&x),
                shape(&y)
            );
            return Err(Error::Adapter(what));
        }
        for (&x, &y) in x.iter().zip(&y) {
            sums.add(&Sums {
                squares: [
                    Sum::new(&[x]).norm().powi(2),
                    Sum::new(&[y]).norm().powi(2),
                    Sum::new(&[x, (-y.0, y.1)]).norm().powi(2),
                    x.0 * y.0 * inner(&x.1, &y.1),
                ],
            });
        }
        Ok((name.clone(), sums))
    };
    let missing = |from: &Adapter, to: &Adapter| -> Vec<String> {
        from.modules.keys().filter(|name| !to.modules.contains_key(*name)).cloned().collect()
    };
    let (only_a, only_b) = (missing(a, b), missing(b, a));
    let names: Vec<&String> = a.modules.keys().chain(&only_b).collect();
    let parts = names.par_iter().map(|name| sums(name)).collect::<Result<Vec<_>>>()?;
    let mut total = Sums::default();
    parts.iter().for_each(|(_, part)| total.add(part));
    let module = |(name, part): &(String, Sums)| {
        let (norm_a, norm_b, distance, cosine) = part.finish();
        ModuleComparison { name: name.clone(), norm_a, norm_b, distance, cosine }
    };
    let both = |name: &String| a.modules.contains_key(name) && b.modules.contains_key(name);
    let modules = parts.iter().filter(|(name, _)| both(name)).map(module).collect();
    let (norm_a, norm_b, distance, cosine) = total.finish();
    Ok(Comparison { norm_a, norm_b, distance, cosine, modules, only_a, only_b })
}
