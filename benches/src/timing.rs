//! How a call is timed. PyTorch's side (`peer/torch_peer.py`) follows the same rules.

use crate::{Result, normal};
use hywu_core::Dtype;
use hywu_kernels::{
    Device, Event, Tape, Tensor, Var,
    ops::{elementwise::scale, noise::noise_window},
};
use std::time::Instant;

/// Inputs and outputs of consecutive calls add up to more than this: three times the L2 cache of an H200.
const ROTATED_BYTES: f64 = 3.0 * 60e6;
/// Most copies of the inputs.
const MOST_COPIES: usize = 64;
/// A sample lasts at least this long, so that the clock's resolution (0.5 us) does not count.
const SAMPLE_MS: f64 = 0.2;
/// A call that takes longer is one that a cold start makes no difference to: it needs no warm-up, and one is enough.
const LONG_MS: f64 = 20e3;

/// How many calls a case gets.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// Calls before the samples, on a device and on the CPU.
    warm_up: [usize; 2],
    /// Bound on the time that all samples on a device take.
    ms: f64,
    /// Samples whatever they take, on a device and on the CPU.
    least: [usize; 2],
}

const USUAL: Effort = Effort { warm_up: [10, 3], ms: 1500.0, least: [5, 7] };

/// Where cases run, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    /// The device.
    pub device: Device,
    /// Few calls of small shapes: shows that everything runs, not how fast.
    pub quick: bool,
    effort: Effort,
}

/// Milliseconds a call.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Median over the samples.
    pub median: f64,
    /// A tenth of the samples is faster.
    pub p10: f64,
    /// A tenth of the samples is slower.
    pub p90: f64,
    /// Number of samples.
    pub samples: usize,
    /// Calls in a sample.
    pub calls: usize,
    /// Copies of the inputs that took turns.
    pub copies: usize,
}

impl Times {
    fn of(mut samples: Vec<f64>, calls: usize, copies: usize) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |part: f64| samples[(part * (samples.len() - 1) as f64).round() as usize];
        let median = samples[samples.len() / 2];
        Self { median, p10: at(0.1), p90: at(0.9), samples: samples.len(), calls, copies }
    }
}

impl Bench {
    /// For a device.
    pub fn new(device: Device, quick: bool) -> Self {
        Self { device, quick, effort: USUAL }
    }

    /// The same with less time for a case: one of many.
    pub fn shorter(self) -> Self {
        let Effort { warm_up: [device, cpu], ms, least } = self.effort;
        Self { effort: Effort { warm_up: [device.min(3), cpu], ms: ms.min(100.0), least }, ..self }
    }

    /// The same for calls of seconds: few are enough, and the calibration is their warm-up.
    pub fn of_long_calls(self) -> Self {
        Self { effort: Effort { warm_up: [0, 1], least: [3, 3], ..self.effort }, ..self }
    }

    /// What is computed in: bf16 on a CUDA device, f32 on the CPU.
    pub fn dtype(&self) -> Dtype {
        if self.device == Device::Cpu { Dtype::F32 } else { Dtype::Bf16 }
    }

    /// Random normal values times `factor`, where the cases run. A device draws them itself: gigabytes would take long to be sent.
    ///
    /// # Errors
    /// Those of the device.
    pub fn tensor(&self, seed: u64, shape: &[usize], factor: f32) -> hywu_kernels::Result<Tensor> {
        let numel: usize = shape.iter().product();
        let Some(width) = shape.last().filter(|_| self.device != Device::Cpu && numel > 0) else {
            return normal(seed, shape, factor).to(self.device, self.dtype());
        };
        let noise = noise_window(self.device, seed, 0, 0, numel / width, *width, 1)?;
        let scaled = scale(&Tape::inference(), &Var::constant(noise), factor)?;
        scaled.value().cast(self.dtype())?.reshape(shape)
    }

    /// The same as a constant.
    ///
    /// # Errors
    /// Those of the device.
    pub fn constant(&self, seed: u64, shape: &[usize], factor: f32) -> hywu_kernels::Result<Var> {
        Ok(Var::constant(self.tensor(seed, shape, factor)?))
    }

    /// Times `call`. `seconds` is how long it goes on at the CPU; `bytes`, what one call reads and writes, says how many copies of the
    /// inputs take turns on a device; `inputs` makes each of them.
    ///
    /// # Errors
    /// Those of `inputs` and `call`.
    pub fn time<I, O>(
        &self,
        seconds: f64,
        bytes: f64,
        mut inputs: impl FnMut(u64) -> Result<I>,
        mut call: impl FnMut(&I) -> Result<O>,
    ) -> Result<Times> {
        if self.device == Device::Cpu {
            let inputs = inputs(0)?;
            return self.cpu_times(seconds, || call(&inputs).map(drop));
        }
        let copies = if self.quick { 2 } else { ((ROTATED_BYTES / bytes) as usize + 1).min(MOST_COPIES) };
        let inputs = (0..copies as u64).map(&mut inputs).collect::<Result<Vec<I>>>()?;
        // Outputs live until their place comes again: else each call would write where the one before did, in the cache.
        let mut outputs: Vec<Option<O>> = (0..copies).map(|_| None).collect();
        let mut turn = 0;
        self.device_times(copies, || {
            outputs[turn] = Some(call(&inputs[turn])?);
            turn = (turn + 1) % copies;
            Ok(())
        })
    }

    fn event(&self) -> Result<Event> {
        Ok(self.device.event()?.ok_or("the CPU has no events")?)
    }

    fn device_times(&self, copies: usize, mut call: impl FnMut() -> Result<()>) -> Result<Times> {
        let mut sample = |calls: usize| -> Result<[Event; 2]> {
            let start = self.event()?;
            (0..calls).try_for_each(|_| call())?;
            Ok([start, self.event()?])
        };
        let lasted = |[start, end]: &[Event; 2]| -> Result<f64> { Ok(f64::from(end.since(start)?)) };
        // The first calls load kernels and fill the memory pool.
        lasted(&sample(if self.quick { 1 } else { self.effort.warm_up[0] })?)?;
        let (mut calls, mut number) = (1, 3);
        if !self.quick {
            let mut ms = lasted(&sample(calls)?)?;
            while ms < SAMPLE_MS && calls < 4096 {
                calls *= 2;
                ms = lasted(&sample(calls)?)?;
            }
            number = ((self.effort.ms / ms) as usize).clamp(self.effort.least[0], 100);
        }
        // Nothing waits between the samples, so that the device never runs dry.
        let samples = (0..number).map(|_| sample(calls)).collect::<Result<Vec<_>>>()?;
        let each = samples.iter().map(|s| Ok(lasted(s)? / calls as f64)).collect::<Result<Vec<f64>>>()?;
        Ok(Times::of(each, calls, copies))
    }

    /// Many calls after a warm-up.
    fn cpu_times(&self, seconds: f64, mut call: impl FnMut() -> Result<()>) -> Result<Times> {
        let mut timed = || -> Result<f64> {
            let t = Instant::now();
            call()?;
            Ok(1e3 * t.elapsed().as_secs_f64())
        };
        let (warm_up, least) = (self.effort.warm_up[1], self.effort.least[1]);
        for _ in 0..warm_up {
            let ms = timed()?;
            if ms > LONG_MS {
                return Ok(Times::of(vec![ms], 1, 1));
            }
        }
        let (start, mut times) = (Instant::now(), Vec::new());
        while times.len() < least || (start.elapsed().as_secs_f64() < seconds && times.len() < 1000) {
            times.push(timed()?);
        }
        Ok(Times::of(times, 1, 1))
    }
}
