//! How much memory a pass takes, and how many rows at a time fit into what there is.

use crate::{Error, GeneratorConfig, Result, config::Shape};
use hywu_core::Dtype;
use hywu_kernels::Device;

/// What a pass may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory: of this process on the CPU, of device memory there. None: on the CPU what is enough for
    /// speed, on a device what is free when the checkpoint is opened.
    pub memory: Option<u64>,
    /// Most rows of the residual stream at a time, where that should be less than speed would want. A sub-layer that needs more at once
    /// takes as many as it needs.
    pub rows: Option<usize>,
}

/// Rows at a time that are enough for speed on the CPU: weights are packed anew for each lot of rows.
const CPU_ROWS: usize = 4096;
/// Elements that a tensor on a device has at most: kernels count them in 31 bits.
const MOST_ELEMENTS: usize = 1 << 30;
/// Rows below which products and attention would be by other kernels than above, with other bits.
const LEAST_ROWS: usize = 256;
/// Bytes for small things on a device.
const DEVICE_KEPT: u64 = 64 << 20;
/// Bytes that the program itself takes on the CPU, and most bytes of freed memory that it keeps for tensors of the same size.
const CPU_PROGRAM: u64 = 64 << 20;
const CPU_POOL: u64 = 1 << 30;

/// One sub-layer's demands in bytes.
#[derive(Clone, Copy, Debug)]
struct Demand {
    /// Whatever the number of rows.
    fixed: u64,
    row: u64,
    /// Rows that it takes at once at least.
    least: usize,
    /// Rows at a time that are enough.
    most: usize,
}

/// The memory of a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    length: usize,
    /// Throughout the pass.
    fixed: u64,
    /// Rows of the stream.
    all: usize,
    /// What the third sub-layer made of all rows at once, which a device adds when the fourth reads them.
    late: u64,
    sublayers: [Demand; 4],
}

impl Memory {
    /// For a batch of conditions of `l` tokens; `streamed`: are weights read as they are used? Else all of them count.
    pub fn new(
        config: &GeneratorConfig,
        shape: Shape,
        device: Device,
        dtype: Dtype,
        streamed: bool,
        batch: usize,
        l: usize,
    ) -> Result<Self> {
        let on_device = device != Device::Cpu;
        let element = if on_device { dtype.size() } else { 4 } as u64;
        let (n, s, d) = (config.num_base_model_layers, shape.s, config.d_model);
        let width = d as u64 * element;
        // That of one instance, which the others start from, is there beside theirs for a while.
        let stream = ((batch + usize::from(batch > 1)) * n * s * d * 4) as u64;
        let condition = (batch * l) as u64 * (2 * width + config.input_dim as u64 * element);
        let tables = (4 * config.head_dim * (n * s + s + n + l)) as u64;
        let weights = if streamed {
            // Those of one sub-layer, and on a device those of the next.
            let part = (8 * d * d + 5 * d) as u64 * element;
            if on_device { 2 * part } else { part }
        } else {
            let numel = |shape: &[usize]| shape.iter().product::<usize>() as u64;
            config.weights()?.iter().map(|(_, shape)| numel(shape)).sum::<u64>() * element
        };
        let rows = if on_device { MOST_ELEMENTS / d } else { CPU_ROWS };
        let demand =
            |fixed, row, least: usize, most: usize| Demand { fixed, row, least, most: most.max(least) };
        // What is read, queries, keys, values and what is mixed of them; operands that are packed; sums of weights, one for each head.
        let packed = if on_device && dtype == Dtype::F32 { 3 } else { u64::from(on_device) };
        let heads = (4 * d / config.head_dim) as u64;
        let mixing = (5 + packed) * width + heads;
        let sublayers = [
            demand(0, mixing, batch * n, rows),
            demand(0, mixing, s, rows),
            demand((2 + packed) * (batch * l) as u64 * width, 4 * width + heads, LEAST_ROWS, rows),
            demand(0, 10 * width, LEAST_ROWS, if on_device { rows / 8 } else { rows }),
        ];
        let kept = if on_device {
            DEVICE_KEPT
        } else {
            // No more than every sub-layer takes, weights included.
            let taken = |d: &Demand| d.fixed + d.most as u64 * d.row;
            let all = sublayers.iter().map(taken).sum::<u64>() + 12 * d as u64 * width;
            CPU_PROGRAM + all.min(CPU_POOL)
        };
        let all = batch * n * s;
        let late = if on_device { all as u64 * width } else { 0 };
        let fixed = stream + condition + tables + weights + kept;
        Ok(Self { length: l, fixed, all, late, sublayers })
    }

    /// Bytes that are enough for a pass.
    pub fn least(&self) -> u64 {
        let demand = |d: &Demand| d.fixed + d.least as u64 * d.row;
        self.fixed + self.sublayers.iter().map(demand).max().unwrap_or(0)
    }
    /// Bytes that a pass takes with so many rows at a time.
    #[cfg(test)]
    fn taken(&self, rows: [usize; 4]) -> u64 {
        let taken = |(i, d): (usize, &Demand)| {
            let late = if i == 3 && rows[2] >= self.all { self.late } else { 0 };
            d.fixed + late + rows[i] as u64 * d.row
        };
        self.fixed + self.sublayers.iter().enumerate().map(taken).max().unwrap_or(0)
    }
    /// # Errors
    /// [`Error::Memory`] when a pass does not fit.
    pub fn check(&self, budget: u64) -> Result<()> {
        let least = self.least();
        if budget < least {
            return Err(Error::Memory { budget, least, length: self.length });
        }
        Ok(())
    }
    /// Rows at a time for every sub-layer.
    ///
    /// # Errors
    /// As [`Memory::check`].
    pub fn rows(&self, limits: Limits) -> Result<[usize; 4]> {
        if let Some(budget) = limits.memory {
            self.check(budget)?;
        }
        let rows = |d: &Demand, late: u64| {
            let taken = self.fixed + d.fixed + late;
            let fit =
                limits.memory.map_or(usize::MAX, |budget| (budget.saturating_sub(taken) / d.row) as usize);
            fit.min(limits.rows.unwrap_or(usize::MAX)).clamp(d.least, d.most)
        };
        let [a, b, c, d] = &self.sublayers;
        let third = rows(c, 0);
        let late = if third >= self.all { self.late } else { 0 };
        Ok([rows(a, 0), rows(b, 0), third, rows(d, late)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Size;

    fn published(device: Device, dtype: Dtype, streamed: bool) -> Memory {
        let config = GeneratorConfig::scaled(Size::Published);
        let shape = config.sizes().expect("a good config").1;
        Memory::new(&config, shape, device, dtype, streamed, 1, 4000).expect("a good config")
    }

    #[test]
    fn the_published_generator_fits_where_it_should() {
        let cpu = published(Device::Cpu, Dtype::F32, true);
        let rows = cpu.rows(Limits::default()).expect("no limit");
        assert!(cpu.taken(rows) <= 6_000_000_000, "{}", cpu.taken(rows));
        let gpu = published(Device::Cuda(0), Dtype::Bf16, false);
        let rows = gpu.rows(Limits { memory: Some(78 << 30), rows: None }).expect("it fits");
        assert!(gpu.taken(rows) <= 60_000_000_000, "{}", gpu.taken(rows));
        assert!(rows[..3].iter().all(|&rows| rows >= 176_512), "{rows:?}");
    }

    #[test]
    fn rows_fill_the_memory_and_no_more() {
        for streamed in [false, true] {
            let memory = published(Device::Cuda(0), Dtype::Bf16, streamed);
            let least = memory.least();
            for budget in [least, least + (1 << 28), least + (4 << 30), least + (6 << 30), least + (40 << 30)]
            {
                let rows = memory.rows(Limits { memory: Some(budget), rows: None }).expect("enough");
                assert!(memory.taken(rows) <= budget, "{budget}: {rows:?}");
            }
            let e = memory.rows(Limits { memory: Some(least - 1), rows: None }).expect_err("too little");
            assert!(e.to_string().contains(&least.to_string()), "{e}");
        }
    }
}
