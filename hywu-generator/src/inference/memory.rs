//! How much memory a pass takes, and how many rows at a time fit into what there is.

use super::pass::Part;
use crate::{
    Error, GeneratorConfig, Result,
    config::{Shape, product},
};
use hywu_core::Dtype;
use hywu_kernels::Device;

/// What a pass may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory: of this process on the CPU, of device memory there. None: what is free when the checkpoint is opened, of which the
    /// CPU takes what is enough for speed.
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

/// A pass to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub device: Device,
    /// Of the arithmetic.
    pub dtype: Dtype,
    /// Are weights read as they are used? Else all of them count.
    pub streamed: bool,
    /// Is what no condition changes kept?
    pub keeping: bool,
    pub batch: usize,
    /// Tokens of a condition.
    pub length: usize,
}

impl Plan {
    fn on_device(&self) -> bool {
        self.device != Device::Cpu
    }
    /// Bytes of an element that is computed with.
    fn element(&self) -> usize {
        if self.on_device() { self.dtype.size() } else { Dtype::F32.size() }
    }
    /// Bytes that a tensor takes.
    fn tensor(&self, shape: &[usize], element: usize) -> u64 {
        self.device.taken(bytes([shape, &[element]].concat()))
    }
    /// Bytes for tensors of so many bytes in all, whose own are not known.
    fn tensors(&self, bytes: u64) -> u64 {
        // An eighth is the most that is left over.
        if self.on_device() { bytes.saturating_add(bytes / 8) } else { bytes }
    }
    /// Those of the weights of a part, or of all.
    pub fn weights(&self, config: &GeneratorConfig, part: Option<Part>) -> Result<u64> {
        let owns = part.map(Part::owns);
        let weights = config.weights()?;
        let of_part = weights.iter().filter(|(name, _)| owns.as_ref().is_none_or(|owns| owns(name)));
        Ok(sum(of_part.map(|(_, shape)| self.tensor(shape, self.element()))))
    }
}

/// The product, or the largest number: sizes come from files.
fn bytes(factors: impl IntoIterator<Item = usize>) -> u64 {
    product(factors.into_iter().map(|n| n as u64))
}

fn sum(parts: impl IntoIterator<Item = u64>) -> u64 {
    parts.into_iter().fold(0, u64::saturating_add)
}

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

impl Demand {
    fn taken(&self, rows: usize) -> u64 {
        self.fixed.saturating_add(self.row.saturating_mul(rows as u64))
    }
}

/// The memory of a pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    batch: usize,
    length: usize,
    /// Throughout the pass.
    fixed: u64,
    /// More, before the first sub-layer and after the last.
    ends: u64,
    /// Rows of the stream.
    all: usize,
    /// What the third sub-layer made of all rows at once, which a device adds when the fourth reads them.
    late: u64,
    sublayers: [Demand; 4],
}

impl Memory {
    pub fn new(config: &GeneratorConfig, shape: Shape, plan: &Plan) -> Result<Self> {
        let Plan { batch, length: l, .. } = *plan;
        let (on_device, element) = (plan.on_device(), plan.element());
        let (n, s, d) = (config.num_base_model_layers, shape.s, config.d_model);
        let width = bytes([d, element]);
        let one = plan.tensor(&[n, s, d], 4);
        // That of one instance, which the others start from, is there beside theirs: for a while, or where it is kept for good.
        let stream =
            sum([plan.tensor(&[batch, n, s, d], 4), if batch > 1 || plan.keeping { one } else { 0 }]);
        let condition = sum([config.input_dim, d, d].map(|width| plan.tensor(&[batch, l, width], element)));
        let tables =
            plan.tensors(bytes([4, config.head_dim, sum([n * s, s, n, l].map(|x| x as u64)) as usize]));
        let weights = if plan.streamed {
            // Those of one part, and on a device those of the next.
            let sublayers = (0..4).map(|index| Part::Sublayer(0, index));
            let parts = [Part::Start, Part::End].into_iter().chain(sublayers);
            let mut parts = parts.map(|part| plan.weights(config, Some(part))).collect::<Result<Vec<_>>>()?;
            parts.sort_unstable();
            sum(parts.into_iter().rev().take(if on_device { 2 } else { 1 }))
        } else {
            plan.weights(config, None)?
        };
        let all = batch.saturating_mul(n * s);
        let rows = if on_device { MOST_ELEMENTS / d } else { CPU_ROWS };
        let demand = |fixed: u64, row: u64, least: usize, most: usize| {
            let least = least.min(all);
            Demand { fixed, row: plan.tensors(row), least, most: most.min(all).max(least) }
        };
        // What is read, queries, keys, values and what is mixed of them; operands that are packed; sums of weights, one for each head.
        let packed = if on_device && plan.dtype == Dtype::F32 { 3 } else { u64::from(on_device) };
        let heads = (4 * d / config.head_dim) as u64;
        let mixing = (5 + packed) * width + heads;
        let memory = plan.tensors(product([2 + packed, batch as u64, l as u64, width]));
        let sublayers = [
            demand(0, mixing, batch.saturating_mul(n), rows),
            demand(0, mixing, s, rows),
            demand(memory, 4 * width + heads, LEAST_ROWS, rows),
            demand(0, 10 * width, LEAST_ROWS, if on_device { rows / 8 } else { rows }),
        ];
        // The tokens of a layer, in f32 as the stream is: positions as they are added up, their sum, its norm.
        let start = bytes([3, s, d, 4]);
        // What is read of a layer, in order and by side, and what is written, on its way to the host in f32.
        let written =
            bytes([shape.t, config.rank, config.output_dim, element + if on_device { 4 } else { 0 }]);
        let end = sum([product([2, s as u64, width]), written]);
        let kept = if on_device {
            DEVICE_KEPT
        } else {
            // No more than every sub-layer takes, weights included.
            let all = sum(sublayers.iter().map(|d| d.taken(d.most)));
            CPU_PROGRAM + all.saturating_add(bytes([12, d, d, element])).min(CPU_POOL)
        };
        let late = if on_device { plan.tensor(&[all, d], element) } else { 0 };
        let fixed = sum([stream, condition, tables, weights, kept]);
        let ends = plan.tensors(start.max(end));
        Ok(Self { batch, length: l, fixed, ends, all, late, sublayers })
    }

    /// Bytes that are enough for a pass.
    pub fn least(&self) -> u64 {
        let most = self.sublayers.iter().map(|d| d.taken(d.least)).fold(self.ends, u64::max);
        self.fixed.saturating_add(most)
    }
    /// Bytes that a pass takes with so many rows at a time.
    #[cfg(test)]
    fn taken(&self, rows: [usize; 4]) -> u64 {
        let taken = |(i, d): (usize, &Demand)| {
            let late = if i == 3 && rows[2] >= self.all { self.late } else { 0 };
            d.taken(rows[i]).saturating_add(late)
        };
        let most = self.sublayers.iter().enumerate().map(taken).fold(self.ends, u64::max);
        self.fixed.saturating_add(most)
    }
    /// # Errors
    /// [`Error::Memory`] when a pass does not fit.
    pub fn check(&self, budget: u64) -> Result<()> {
        let least = self.least();
        if budget < least {
            return Err(Error::Memory { budget, least, batch: self.batch, length: self.length });
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
            let taken = sum([self.fixed, d.fixed, late]);
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

    fn plan(device: Device, dtype: Dtype, streamed: bool) -> Plan {
        Plan { device, dtype, streamed, keeping: false, batch: 1, length: 4000 }
    }

    fn memory(config: &GeneratorConfig, plan: &Plan) -> Memory {
        Memory::new(config, config.sizes().expect("a good config").1, plan).expect("a good config")
    }

    fn published(device: Device, dtype: Dtype, streamed: bool) -> Memory {
        memory(&GeneratorConfig::scaled(Size::Published), &plan(device, dtype, streamed))
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

    #[test]
    fn numbers_that_can_not_be_counted_need_more_than_there_is() {
        let config = GeneratorConfig::scaled(Size::Published);
        for device in [Device::Cpu, Device::Cuda(0)] {
            for (batch, length) in [(1 << 50, 1), (1, 1 << 62), (usize::MAX, usize::MAX)] {
                let plan = Plan { batch, length, ..plan(device, Dtype::Bf16, true) };
                let memory = memory(&config, &plan);
                assert!(memory.least() > 1 << 62, "{memory:?}");
                assert!(memory.rows(Limits { memory: Some(1 << 40), rows: None }).is_err());
            }
        }
    }

    #[test]
    fn a_start_that_is_kept_is_one_more_stream() {
        let config = GeneratorConfig::scaled(Size::Published);
        let stream = 176_512 * 4096 * 4;
        for device in [Device::Cpu, Device::Cuda(0)] {
            let least = |keeping, batch| {
                memory(&config, &Plan { keeping, batch, ..plan(device, Dtype::Bf16, true) }).least()
            };
            assert!(least(true, 1) >= least(false, 1) + stream);
            // It is what the others of a batch start from.
            assert_eq!(least(true, 2), least(false, 2));
        }
    }

    /// A generator whose first and last weights and tokens are larger than all that lies between.
    #[test]
    fn ends_count_where_they_are_larger() {
        let config = r#"{"num_base_model_layers": 1, "rank": 16, "token_dim": 4096, "output_dim": 4096, "dim_accumulation": 16,
            "d_model": 64, "head_dim": 16, "num_pg_layers": 1, "input_dim": 65536,
            "pg_mapping": {"x": {"lora_A_dim": 60000, "lora_B_dim": 60000}}}"#;
        let config = GeneratorConfig::from_json(config.as_bytes()).expect("a good config");
        let shape = config.sizes().expect("a good config").1;
        let written = (shape.t * 16 * 4096 * 4) as u64;
        let start = 64 * 65_536 * 4;
        for device in [Device::Cpu, Device::Cuda(0)] {
            let memory = memory(&config, &Plan { length: 1, ..plan(device, Dtype::F32, true) });
            assert!(memory.least() - DEVICE_KEPT.max(CPU_PROGRAM) >= written + start, "{memory:?}");
        }
    }
}
