//! What generated adapters have to do with each other, told from the inner products of their updates alone (not of the factors, which
//! are not unique): principal components, a neighbour embedding, purity of neighbourhoods and cosines.

use super::report::AdapterLabel;
use anyhow::{Context, Result, ensure};
use nalgebra::{DMatrix, SymmetricEigen};
use ndarray::Array2;
use rayon::ThreadPoolBuilder;
use serde::{Deserialize, Serialize};

/// Principal components that the neighbour embedding sees.
const COMPONENTS: usize = 50;
/// Perplexity of the neighbour embedding, where there are enough adapters.
const PERPLEXITY: f64 = 30.0;
/// Fewest adapters of which anything can be told.
const FEWEST: usize = 7;
/// Neighbours of the wider purity.
const NEIGHBOURS: usize = 5;
/// Shares of variance that are reported.
const SHARES: usize = 10;

/// How adapters lie in the space of updates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Structure {
    /// One for each adapter, in order.
    pub points: Vec<Point>,
    /// Shares of the variance that the first principal components hold.
    pub shares: Vec<f64>,
    /// Share of the variance that is between skills, the rest being within.
    pub between_skills: f64,
    /// Squared norm of the mean update over the mean squared norm: what all have in common.
    pub common: f64,
    /// How often the nearest other adapter is of the same skill. One of the same skill and photo doesn't count as other.
    pub nearest: f64,
    /// Share of the same skill among the five nearest.
    pub five_nearest: f64,
    /// Both by chance.
    pub chance: f64,
    /// In the order of rows and columns below.
    pub skills: Vec<String>,
    /// Mean cosine between two adapters of these skills.
    pub cosine: Vec<Vec<f64>>,
    /// Mean cosine between two adapters of one skill.
    pub within: f64,
    /// Mean cosine between adapters of different skills.
    pub across: f64,
    /// As `within`, of the differences from the mean update.
    pub centred_within: f64,
    /// As `across`, of the differences from the mean update.
    pub centred_across: f64,
}

/// Where an adapter lies on the two maps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Index into [`Structure::skills`].
    pub skill: usize,
    /// First two principal components.
    pub pca: [f64; 2],
    /// t-SNE (van der Maaten and Hinton 2008) of the principal components.
    pub neighbours: [f64; 2],
}

/// Principal components of updates.
pub(super) struct Components {
    /// [n, components], by falling variance; the entry of largest size in each column is positive.
    pub coordinates: DMatrix<f64>,
    /// Share of the variance of each.
    pub shares: Vec<f64>,
}

/// Kernel PCA (Schölkopf, Smola and Müller 1998) with the linear kernel `gram`: the principal components of what it holds the inner
/// products of. None when all are the same.
pub(super) fn components(gram: &Array2<f64>, most: usize) -> Option<Components> {
    let centred = centred(gram);
    let n = centred.nrows();
    let total = centred.trace();
    // What is left of equal updates is rounding.
    if total <= 1e-12 * (0..n).map(|i| gram[(i, i)]).sum::<f64>() {
        return None;
    }
    let eigen = SymmetricEigen::new(centred);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| eigen.eigenvalues[j].total_cmp(&eigen.eigenvalues[i]));
    order.truncate(most.min(n));
    let sign = |k: usize| {
        let column = eigen.eigenvectors.column(k);
        if column[column.icamax()] < 0.0 { -1.0 } else { 1.0 }
    };
    let factors: Vec<f64> = order.iter().map(|&k| sign(k) * eigen.eigenvalues[k].max(0.0).sqrt()).collect();
    Some(Components {
        coordinates: DMatrix::from_fn(n, order.len(), |i, c| eigen.eigenvectors[(i, order[c])] * factors[c]),
        shares: order.iter().map(|&k| eigen.eigenvalues[k].max(0.0) / total).collect(),
    })
}

/// Inner products of the differences from the mean.
fn centred(gram: &Array2<f64>) -> DMatrix<f64> {
    let n = gram.nrows();
    let means: Vec<f64> = gram.rows().into_iter().map(|row| row.sum() / n as f64).collect();
    let mean = means.iter().sum::<f64>() / n as f64;
    DMatrix::from_fn(n, n, |i, j| gram[(i, j)] - means[i] - means[j] + mean)
}

/// Describes adapters with these inner products ([`hywu_core::adapter::gram()`]) and labels. None where there are fewer than seven, or
/// all are the same.
///
/// # Errors
/// Other than one label an adapter; numbers that are not finite.
pub fn structure(gram: &Array2<f64>, labels: &[AdapterLabel]) -> Result<Option<Structure>> {
    let n = labels.len();
    ensure!(gram.dim() == (n, n), "{n} labels for inner products of shape {:?}", gram.dim());
    ensure!(gram.iter().all(|v| v.is_finite()), "the inner products of the adapters are not finite");
    if n < FEWEST {
        return Ok(None);
    }
    let Some(parts) = components(gram, COMPONENTS) else { return Ok(None) };
    let mut skills: Vec<String> = Vec::new();
    let mut of = Vec::with_capacity(n);
    for label in labels {
        let known = skills.iter().position(|s| *s == label.skill);
        of.push(known.unwrap_or_else(|| {
            skills.push(label.skill.clone());
            skills.len() - 1
        }));
    }
    let map = neighbour_embedding(&parts.coordinates)?;
    let centred = centred(gram);
    let point = |i: usize| {
        let pca = [0, 1].map(|c| if c < parts.coordinates.ncols() { parts.coordinates[(i, c)] } else { 0.0 });
        Point { skill: of[i], pca, neighbours: map[i] }
    };
    let (nearest, five_nearest, chance) = purity(gram, labels);
    let plain = DMatrix::from_fn(n, n, |i, j| gram[(i, j)]);
    let (within, across) = mean_cosines(&plain, &of);
    let (centred_within, centred_across) = mean_cosines(&centred, &of);
    let cosine = (0..skills.len()).map(|a| (0..skills.len()).map(|b| block(&plain, &of, a, b)).collect());
    Ok(Some(Structure {
        points: (0..n).map(point).collect(),
        shares: parts.shares.into_iter().take(SHARES).collect(),
        between_skills: between(&centred, &of, skills.len()),
        common: gram.sum() / n as f64 / plain.trace(),
        nearest,
        five_nearest,
        chance,
        cosine: cosine.collect(),
        skills,
        within,
        across,
        centred_within,
        centred_across,
    }))
}

/// t-SNE in two dimensions, from the first two principal components on, so that nothing in it is drawn. On one thread: the crate adds
/// in parallel, in an order that depends on the number of threads.
fn neighbour_embedding(coordinates: &DMatrix<f64>) -> Result<Vec<[f64; 2]>> {
    let n = coordinates.nrows();
    let size = (coordinates.norm_squared() / n as f64).sqrt();
    let rows: Vec<Vec<f64>> =
        coordinates.row_iter().map(|row| row.iter().map(|v| v / size).collect()).collect();
    let first = coordinates.column(0);
    let spread = (first.norm_squared() / n as f64).sqrt();
    let start: Vec<f64> = rows
        .iter()
        .flat_map(|row| [0, 1].map(|c| row.get(c).map_or(0.0, |v| 1e-2 * v * size / spread)))
        .collect();
    let pool =
        ThreadPoolBuilder::new().num_threads(1).build().context("a thread for the neighbour embedding")?;
    let flat = pool.install(|| {
        let distance =
            |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        let mut map: bhtsne::tSNE<'_, f64, Vec<f64>> = bhtsne::tSNE::new(&rows);
        map.perplexity(PERPLEXITY.min((n - 1) as f64 / 3.0)).initial_embedding(start).exact(distance);
        map.embedding()
    });
    Ok(flat.chunks_exact(2).map(|p| [p[0], p[1]]).collect())
}

/// Shares of the same skill among the one and the five nearest others, and by chance. What shares skill and photo is left out, since
/// it is too easy to find.
fn purity(gram: &Array2<f64>, labels: &[AdapterLabel]) -> (f64, f64, f64) {
    let (mut one, mut five, mut chance, mut counted) = (0.0, 0.0, 0.0, 0);
    for (i, label) in labels.iter().enumerate() {
        let mut others: Vec<usize> = (0..labels.len())
            .filter(|&j| j != i && (labels[j].skill != label.skill || labels[j].photo != label.photo))
            .collect();
        let same = |j: &&usize| labels[**j].skill == label.skill;
        let there = others.iter().filter(same).count();
        if there == 0 {
            continue;
        }
        let distance = |j: usize| gram[(j, j)] - 2.0 * gram[(i, j)];
        others.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)));
        let share = |k: usize| {
            let k = k.min(others.len());
            others[..k].iter().filter(same).count() as f64 / k as f64
        };
        one += share(1);
        five += share(NEIGHBOURS);
        chance += there as f64 / others.len() as f64;
        counted += 1;
    }
    let n = f64::from(counted.max(1));
    (one / n, five / n, chance / n)
}

/// Cosine of two updates; zero where one of them is.
fn cosine(gram: &DMatrix<f64>, i: usize, j: usize) -> f64 {
    let size = (gram[(i, i)].max(0.0) * gram[(j, j)].max(0.0)).sqrt();
    if size > 0.0 { gram[(i, j)] / size } else { 0.0 }
}

/// Mean of numbers, zero for none.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), v| (sum + v, n + 1));
    sum / f64::from(n.max(1))
}

/// Mean cosine between different adapters of skills `a` and `b`.
fn block(gram: &DMatrix<f64>, of: &[usize], a: usize, b: usize) -> f64 {
    let all = |skill: usize| (0..of.len()).filter(move |&i| of[i] == skill);
    mean(all(a).flat_map(|i| all(b).filter(move |&j| j != i).map(move |j| cosine(gram, i, j))))
}

/// Mean cosine over pairs of one skill, and over pairs of two.
fn mean_cosines(gram: &DMatrix<f64>, of: &[usize]) -> (f64, f64) {
    let pairs = |same: bool| {
        let n = of.len();
        (0..n)
            .flat_map(move |i| (i + 1..n).map(move |j| (i, j)))
            .filter(move |&(i, j)| (of[i] == of[j]) == same)
    };
    let over = |same: bool| mean(pairs(same).map(|(i, j)| cosine(gram, i, j)));
    (over(true), over(false))
}

/// Share of the variance that is between the means of the skills.
fn between(centred: &DMatrix<f64>, of: &[usize], skills: usize) -> f64 {
    let explained: f64 = (0..skills)
        .map(|skill| {
            let own: Vec<usize> = (0..of.len()).filter(|&i| of[i] == skill).collect();
            let sum: f64 = own.iter().flat_map(|&i| own.iter().map(move |&j| centred[(i, j)])).sum();
            sum / own.len().max(1) as f64
        })
        .sum();
    (explained / centred.trace()).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hywu_core::Philox;

    /// Inner products of `points`.
    fn gram_of(points: &[Vec<f64>]) -> Array2<f64> {
        Array2::from_shape_fn((points.len(), points.len()), |(i, j)| {
            points[i].iter().zip(&points[j]).map(|(a, b)| a * b).sum()
        })
    }

    /// `each` points around each of three far corners, of `dims` dimensions, and their labels.
    fn clusters(each: usize, noise: f64) -> (Vec<Vec<f64>>, Vec<AdapterLabel>) {
        let mut random = Philox::new(5).stream(0);
        let (mut points, mut labels) = (Vec::new(), Vec::new());
        for (skill, name) in ["blur", "deblur", "fog"].into_iter().enumerate() {
            for photo in 0..each {
                let mut point: Vec<f64> = (0..8).map(|_| noise * f64::from(random.normal())).collect();
                point[skill] += 10.0;
                points.push(point);
                labels.push(AdapterLabel {
                    skill: name.into(),
                    photo,
                    instruction: String::new(),
                    hidden: Default::default(),
                });
            }
        }
        (points, labels)
    }

    #[test]
    fn clusters_are_found() {
        let (points, labels) = clusters(6, 0.5);
        let found = structure(&gram_of(&points), &labels).expect("finite").expect("eighteen");
        assert_eq!((found.nearest, found.five_nearest), (1.0, 1.0));
        // Five others of the skill among seventeen.
        assert!((found.chance - 5.0 / 17.0).abs() < 1e-12);
        assert!(found.within > 0.9 && found.across < 0.2, "{} {}", found.within, found.across);
        // Three corners of a triangle, seen from its middle, are 120 degrees apart.
        assert!(found.centred_within > 0.9 && (found.centred_across + 0.5).abs() < 0.1);
        assert!(found.between_skills > 0.9 && found.shares[0] + found.shares[1] > 0.9);
        assert_eq!(found.skills, ["blur", "deblur", "fog"]);
        let distance = |a: [f64; 2], b: [f64; 2]| (a[0] - b[0]).hypot(a[1] - b[1]);
        for map in [|p: &Point| p.pca, |p: &Point| p.neighbours] {
            for (i, a) in found.points.iter().enumerate() {
                let mut others: Vec<(f64, usize)> = found
                    .points
                    .iter()
                    .enumerate()
                    .filter(|(j, _)| *j != i)
                    .map(|(_, b)| (distance(map(a), map(b)), b.skill))
                    .collect();
                others.sort_by(|x, y| x.0.total_cmp(&y.0));
                assert_eq!(others[0].1, a.skill, "the nearest of {i} on a map");
            }
        }
        let again = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("a pool");
        let again =
            again.install(|| structure(&gram_of(&points), &labels)).expect("finite").expect("eighteen");
        assert_eq!(found, again);
    }

    #[test]
    fn without_clusters_nothing_is_found() {
        let (points, mut labels) = clusters(20, 0.0);
        let mut random = Philox::new(8).stream(0);
        let points: Vec<Vec<f64>> =
            points.iter().map(|p| p.iter().map(|_| f64::from(random.normal())).collect()).collect();
        labels.iter_mut().enumerate().for_each(|(i, l)| l.photo = i);
        let found = structure(&gram_of(&points), &labels).expect("finite").expect("sixty");
        assert!((found.five_nearest - found.chance).abs() < 0.12, "{} {}", found.five_nearest, found.chance);
        assert!(found.between_skills < 0.15 && (found.within - found.across).abs() < 0.1);
    }

    #[test]
    fn principal_components_keep_the_distances() {
        let (points, _) = clusters(4, 2.0);
        let parts = components(&gram_of(&points), 50).expect("they differ");
        let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        let row = |i: usize| parts.coordinates.row(i).iter().copied().collect::<Vec<f64>>();
        for i in 0..points.len() {
            for j in 0..i {
                let (kept, real) = (square(&row(i), &row(j)), square(&points[i], &points[j]));
                assert!((kept - real).abs() < 1e-8 * real, "{kept} {real}");
            }
        }
        assert!((parts.shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn too_few_and_equal_adapters_have_no_structure() {
        let (points, labels) = clusters(2, 1.0);
        assert!(structure(&gram_of(&points), &labels).expect("finite").is_none());
        let (points, labels) = clusters(4, 1.0);
        let equal = vec![points[0].clone(); 12];
        assert!(structure(&gram_of(&equal), &labels).expect("finite").is_none());
        assert!(structure(&gram_of(&points), &labels[1..]).is_err());
        let mut broken = gram_of(&points);
        broken[(0, 1)] = f64::NAN;
        assert!(structure(&broken, &labels).is_err());
    }
}
