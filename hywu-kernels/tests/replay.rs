//! Replays: a training loop gives the same bits with and without, whatever changes from step to step, and really is replayed.

use hywu_kernels::{
    Device, Error, ParamSet, Replay, Result, Tape, Tensor, Var,
    ops::{
        elementwise::mean_of, loss::weighted_mse, low_rank_linear::linear, noise::noised, rms_norm::rms_norm,
    },
    optim::{Optimizer, Schedule},
    testing::{Place, places, random, unguarded},
};
use std::sync::{Mutex, PoisonError, mpsc};

/// Runs a test at every CUDA place, one at a time: a device replays for one thread only.
fn at_devices(test: impl Fn(Place)) {
    static TURN: Mutex<()> = Mutex::new(());
    let places = places().into_iter().filter(|place| place.device != Device::Cpu);
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    unguarded(|| places.for_each(test));
}

/// Two layers that learn to take noise away.
struct Model {
    place: Place,
    params: ParamSet,
    optimizer: Optimizer,
}

/// Everything that a run leaves: losses, norms, weights and averaged weights.
#[derive(PartialEq, Debug, Default)]
struct Trace {
    numbers: Vec<u64>,
    weights: Vec<u32>,
}

impl Model {
    fn new(place: Place) -> Self {
        let mut params = ParamSet::new();
        for (i, (name, shape)) in [("w1", [24, 16]), ("w2", [16, 24])].into_iter().enumerate() {
            params.insert(name, random(i as u64, &shape));
        }
        params.insert("scale", Tensor::full(&[24], 1.0));
        let params = params.to_mixed(place.device, place.dtype).expect("the device works");
        let schedule = Schedule { warmup: 3, total: 20, peak: 0.05, floor: 0.01 };
        let optimizer = Optimizer::new(&params, schedule, 0.1, 0.5, Some(0.9)).expect("enough memory");
        Self { place, params, optimizer }
    }

    /// Data, noise, timesteps and learning rate are the step's own.
    fn step(&mut self, step: u64, batch: usize) -> Result<(f32, f64)> {
        let target = self.place.tensor(&random(100 + step, &[batch, 5, 16]));
        let t: Vec<f32> = (0..batch).map(|i| (step as usize + i) as f32 / 40.0).collect();
        let tape = Tape::new();
        let bound = self.params.bind(&tape, true)?;
        let x = Var::constant(noised(&target, &t, step)?);
        let x = linear(&tape, &x, bound.get("w1")?, None)?;
        let x = rms_norm(&tape, &x, Some(bound.get("scale")?), 1e-5, None)?;
        let y = linear(&tape, &x, bound.get("w2")?, None)?;
        let loss = weighted_mse(&tape, &y, &target, &vec![1.0; batch])?;
        let value = loss.value().clone();
        let grads = bound.take_grads(&mut tape.backward(&loss)?)?;
        drop(bound);
        let stats = self.optimizer.step(&mut self.params, &grads)?;
        Ok((value.item()?, stats.grad_norm))
    }

    fn leave(&self, trace: &mut Trace) {
        for set in [&self.params, self.optimizer.averaged(&self.params)] {
            for (_, tensor) in set.iter() {
                let host = tensor.to_host().expect("the device works");
                trace.weights.extend(host.data().iter().map(|v| v.to_bits()));
            }
        }
    }
}

/// Steps with these batch sizes; `with` runs each of them.
fn train(
    place: Place,
    batches: &[usize],
    mut with: impl FnMut(usize, &mut dyn FnMut() -> Result<(f32, f64)>) -> Result<(f32, f64)>,
) -> Trace {
    let (mut model, mut trace) = (Model::new(place), Trace::default());
    for (step, &batch) in batches.iter().enumerate() {
        let (loss, norm) = with(batch, &mut || model.step(step as u64, batch)).expect("the step works");
        trace.numbers.extend([u64::from(loss.to_bits()), norm.to_bits()]);
    }
    model.leave(&mut trace);
    trace
}

/// Without replaying: every step is the first run of its own. (Outside of a run cuBLASLt may take part, with other bits.)
fn plain(place: Place, batches: &[usize]) -> Trace {
    train(place, batches, |_, step| place.device.replay().run(step))
}

fn with_one(replay: &mut Replay, place: Place, batches: &[usize]) -> Trace {
    train(place, batches, |_, step| replay.run(step))
}

#[test]
fn twelve_steps_are_bit_equal() {
    at_devices(|place| {
        let mut replay = place.device.replay();
        assert_eq!(with_one(&mut replay, place, &[3; 12]), plain(place, &[3; 12]), "{place:?}");
        // One to warm up, one to record.
        assert_eq!(replay.replayed(), 10, "{place:?}");
    });
}

#[test]
fn a_profile_counts_launches_and_changes_no_bit() {
    at_devices(|place| {
        let mut profile = place.device.profile().expect("the device works").expect("it is none for the CPU");
        let mut replay = place.device.replay();
        let seen = train(place, &[3; 4], |_, step| profile.run(|| replay.run(&mut *step)));
        assert_eq!(seen, plain(place, &[3; 4]), "{place:?}");
        assert_eq!(replay.replayed(), 0, "{place:?}");
        let table = profile.to_string();
        assert!(table.starts_with("4 steps"), "{table}");
        for (operation, count) in [("finish_norm [1, 1, 1] x 256", "1.0"), ("copy from the device", "2.0")] {
            let row = table.lines().find(|line| line.ends_with(operation)).expect(operation);
            assert_eq!(row.split_whitespace().next(), Some(count), "{table}");
        }
    });
}

#[test]
fn another_shape_is_recorded_anew() {
    at_devices(|place| {
        let batches = [[3; 5], [4; 5], [3; 5]].concat();
        let mut replay = place.device.replay();
        assert_eq!(with_one(&mut replay, place, &batches), plain(place, &batches), "{place:?}");
        // Of the first five steps two are not replayed, of the others the one that differs and the one that records.
        assert_eq!(replay.replayed(), 9, "{place:?}");
        // Never the same twice: given up, and still right.
        let batches = [3, 4, 5].repeat(5);
        let mut replay = place.device.replay();
        assert_eq!(with_one(&mut replay, place, &batches), plain(place, &batches), "{place:?}");
        assert_eq!(replay.replayed(), 0, "{place:?}");
    });
}

#[test]
fn two_replays_take_turns() {
    at_devices(|place| {
        let batches = [3, 6].repeat(6);
        let mut replays = [place.device.replay(), place.device.replay()];
        let traced = train(place, &batches, |batch, step| replays[batch / 6].run(step));
        assert_eq!(traced, plain(place, &batches), "{place:?}");
        assert_eq!(replays.map(|r| r.replayed()), [4, 4], "{place:?}");
    });
}

#[test]
fn a_body_that_fails_has_done_what_it_did() {
    at_devices(|place| {
        let start = random(1, &[40]);
        let run = |mut replay: Option<Replay>| {
            let mut sum = place.tensor(&start);
            let mut kept = Vec::new();
            for step in 0..9 {
                let mut body = || {
                    let x = place.tensor(&random(step, &[40]));
                    sum.add_assign(&x)?;
                    if step == 4 {
                        return Err(Error::invalid("test", "in the middle"));
                    }
                    sum.add_assign(&x)?;
                    mean_of(&sum, &x)
                };
                let result = match &mut replay {
                    Some(replay) => replay.run(body),
                    None => body(),
                };
                assert_eq!(result.is_err(), step == 4);
                // What leaves the body stays, whatever runs afterwards.
                kept.extend(result.ok());
            }
            kept.push(sum);
            let bits = |x: &Tensor| -> Vec<u32> {
                x.to_host().expect("the device works").data().iter().map(|v| v.to_bits()).collect()
            };
            (kept.iter().flat_map(bits).collect::<Vec<_>>(), replay.map_or(0, |r| r.replayed()))
        };
        let (plain, _) = run(None);
        let (replayed, times) = run(Some(place.device.replay()));
        assert_eq!(replayed, plain, "{place:?}");
        assert!(times > 0, "{place:?}");
    });
}

#[test]
fn a_panic_ends_the_run() {
    at_devices(|place| {
        let mut replay = place.device.replay();
        let mut sum = place.tensor(&Tensor::zeros(&[40]));
        let one = place.tensor(&Tensor::full(&[40], 1.0));
        for step in 0..8 {
            let body = std::panic::AssertUnwindSafe(|| {
                replay.run(|| {
                    sum.add_assign(&one)?;
                    assert!(step != 4, "in the middle");
                    Ok::<_, Error>(())
                })
            });
            assert_eq!(std::panic::catch_unwind(body).is_err(), step == 4);
        }
        assert_eq!(sum.to_host().expect("the device works").data(), vec![8.0; 40], "{place:?}");
        assert!(replay.replayed() > 2, "{place:?}");
    });
}

#[test]
fn other_threads_see_what_was_done_before() {
    at_devices(|place| {
        let (send, receive) = mpsc::channel::<Tensor>();
        let (answer, answers) = mpsc::channel();
        let other = std::thread::spawn(move || {
            for x in receive {
                let mut sum = x.full_like(x.shape(), 1.0).expect("memory");
                sum.add_assign(&x).expect("the device works");
                answer.send(sum).expect("someone listens");
            }
        });
        let mut replay = place.device.replay();
        for step in 0..8u64 {
            let n = step as f32;
            let sum = replay.run(|| {
                let mut x = place.tensor(&Tensor::full(&[40], n));
                x.add_assign(&place.tensor(&Tensor::full(&[40], 2.0)))?;
                // The other thread needs what may have been held back.
                if step.is_multiple_of(2) {
                    send.send(x.clone()).expect("someone listens");
                    x = answers.recv().expect("an answer");
                } else {
                    x.add_assign(&place.tensor(&Tensor::full(&[40], 1.0)))?;
                }
                Ok::<_, Error>(x)
            });
            let sum = sum.and_then(|x| x.to_host()).expect("the device works");
            assert_eq!(sum.data(), vec![n + 3.0; 40], "{place:?}, step {step}");
        }
        drop(send);
        other.join().expect("no panic");
    });
}

#[test]
fn a_run_within_a_run_is_part_of_it() {
    at_devices(|place| {
        let (mut outer, mut inner) = (place.device.replay(), place.device.replay());
        let nested = train(place, &[3; 6], |_, step| outer.run(|| inner.run(&mut *step)));
        assert_eq!(nested, plain(place, &[3; 6]), "{place:?}");
        assert_eq!((outer.replayed(), inner.replayed()), (4, 0), "{place:?}");
    });
}

#[test]
fn the_cpu_just_runs_the_body() {
    let mut replay = Device::Cpu.replay();
    for i in 0..4 {
        assert_eq!(replay.run(|| Ok::<_, Error>(i)).expect("no error"), i);
    }
    assert!(replay.run(|| Err::<(), _>(Error::invalid("test", "no"))).is_err());
    assert_eq!(replay.replayed(), 0);
}
