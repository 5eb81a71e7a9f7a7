//! Means with intervals.

use super::report::Interval;
use hywu_core::Philox;

/// Share of the resamples that an interval leaves out on each side.
pub const TAIL: f64 = 0.025;

/// Numbers crossed over two factors that both could have fallen out otherwise: `cells[seed][photo]`. All rows are equally long.
pub type Cells = Vec<Vec<f64>>;

/// The mean of all cells with its 95 % bootstrap interval: rows and columns are drawn anew independently, since edits of one photo, and
/// those of one training, resemble each other (the pigeonhole bootstrap, Owen, arXiv 0712.1111). With a single row only the columns
/// vary. The same cells give the same interval.
pub fn interval(cells: &[Vec<f64>], resamples: usize) -> Interval {
    let (rows, columns) = (cells.len(), cells.first().map_or(0, Vec::len));
    let mean = cells.iter().flatten().sum::<f64>() / (rows * columns).max(1) as f64;
    if rows * columns == 0 {
        return Interval { mean, lo: mean, hi: mean };
    }
    let mut means: Vec<f64> = (0..resamples as u64)
        .map(|resample| {
            let mut random = Philox::new(0).stream(resample);
            let mut draw = |n: usize| {
                let mut times = vec![0.0; n];
                (0..n).for_each(|_| times[random.below(n)] += 1.0);
                times
            };
            let (by_row, by_column) = (draw(rows), draw(columns));
            let row = |cells: &Vec<f64>| cells.iter().zip(&by_column).map(|(x, n)| x * n).sum::<f64>();
            let sum: f64 = cells.iter().zip(&by_row).map(|(cells, n)| n * row(cells)).sum();
            sum / (rows * columns) as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    Interval { mean, lo: quantile(&means, TAIL).min(mean), hi: quantile(&means, 1.0 - TAIL).max(mean) }
}

/// Linear between neighbours of the sorted values; NaN without any.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * sorted.len().saturating_sub(1) as f64;
    let low = at as usize;
    match (sorted.get(low), sorted.get(low + 1)) {
        (Some(a), Some(b)) => a + (at - low as f64) * (b - a),
        (Some(a), None) => *a,
        _ => f64::NAN,
    }
}

/// Cell by cell.
pub fn difference(a: &[Vec<f64>], b: &[Vec<f64>]) -> Cells {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a - b).collect()).collect()
}

/// Mean of tables of one size, cell by cell.
pub fn mean_cells(tables: &[&Cells]) -> Cells {
    let Some(first) = tables.first() else { return Cells::new() };
    let cell = |s: usize, p: usize| tables.iter().map(|t| t[s][p]).sum::<f64>() / tables.len() as f64;
    (0..first.len()).map(|s| (0..first[s].len()).map(|p| cell(s, p)).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_sample_is_that_of_its_mean() {
        // 400 draws of N(3, 2): the standard error is 0.1, so the interval is 3 +- about 0.2.
        let mut sample = vec![0.0f32; 400];
        Philox::new(7).fill_normal(0, 0, &mut sample);
        let cells = [sample.iter().map(|x| 3.0 + 2.0 * f64::from(*x)).collect::<Vec<_>>()];
        let mean = cells[0].iter().sum::<f64>() / 400.0;
        let deviation = (cells[0].iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 400.0).sqrt();
        let found = interval(&cells, 4000);
        assert_eq!(found.mean, mean);
        let half = 1.96 * deviation / 20.0;
        assert!(
            (found.lo - (mean - half)).abs() < 0.03 && (found.hi - (mean + half)).abs() < 0.03,
            "{found:?}"
        );
        assert_eq!(found, interval(&cells, 4000));
    }

    #[test]
    fn what_all_photos_share_does_not_average_out() {
        // Each seed moves all photos together: more photos tell nothing about seeds.
        let of = |photos: usize| [vec![-1.0; photos], vec![0.0; photos], vec![1.0; photos]];
        let (few, many) = (interval(&of(2), 2000), interval(&of(200), 2000));
        assert!(few.hi - few.lo > 1.0 && many.hi - many.lo > 1.0, "{few:?} {many:?}");
        let equal = interval(&[vec![2.5; 4], vec![2.5; 4]], 100);
        assert!((equal.lo - 2.5).abs() < 1e-12 && (equal.hi - 2.5).abs() < 1e-12);
    }

    #[test]
    fn quantiles_are_linear_between_values() {
        let sorted = [0.0, 10.0, 20.0];
        assert_eq!([0.0, 0.25, 0.5, 1.0].map(|q| quantile(&sorted, q)), [0.0, 5.0, 10.0, 20.0]);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn tables_add_cell_by_cell() {
        let (a, b) = (vec![vec![1.0, 2.0]], vec![vec![3.0, 8.0]]);
        assert_eq!(difference(&b, &a), [[2.0, 6.0]]);
        assert_eq!(mean_cells(&[&a, &b]), [[2.0, 5.0]]);
    }
}
