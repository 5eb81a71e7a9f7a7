//! Tensors on a device: transfers, shared storage, memory that runs out, devices that are not there.

use hywu_core::Dtype;
use hywu_kernels::{
    Device, Error, Tensor, Var,
    ops::elementwise::add,
    testing::{Place, for_each_place, places, random, rounded_to_bf16},
};
use std::{env, process::Command};

fn host(x: &Tensor) -> Vec<f32> {
    x.to_host().expect("the device works").data().to_vec()
}

/// The values that the place holds.
fn held(place: Place, x: &Tensor) -> Vec<f32> {
    if place.dtype == Dtype::Bf16 { rounded_to_bf16(x).data().to_vec() } else { x.data().to_vec() }
}

/// The last one is more than one part of a transfer.
const SIZES: [usize; 14] = [0, 1, 7, 8, 9, 15, 16, 17, 127, 128, 129, 1023, 1025, (4 << 20) + 3];

#[test]
fn values_arrive_and_come_back() {
    for_each_place(|place| {
        for n in SIZES {
            let x = random(1, &[n]);
            let there = place.tensor(&x);
            assert_eq!(
                (there.device(), there.dtype(), there.shape()),
                (place.device, place.dtype, x.shape())
            );
            assert_eq!(host(&there), held(place, &x), "{n} values at {place:?}");
            // Another dtype and back changes nothing that bf16 holds.
            let back = there.cast(Dtype::Bf16).and_then(|x| x.cast(Dtype::F32)).expect("the device works");
            let kept = if place.device == Device::Cpu { x.clone() } else { rounded_to_bf16(&x) };
            assert_eq!(host(&back), kept.data(), "{n} values at {place:?}");
        }
        // A scalar, and values that are not finite.
        assert_eq!(place.tensor(&Tensor::scalar(-2.5)).item().expect("one"), -2.5);
        let odd = Tensor::new(&[4], vec![f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::NAN]).expect("four");
        let back = host(&place.tensor(&odd));
        assert_eq!((back[..3].to_vec(), back[3].is_nan()), (odd.data()[..3].to_vec(), true));
        assert!(back[2].is_sign_negative());
    });
}

#[test]
fn new_tensors_are_where_the_old_one_is() {
    for_each_place(|place| {
        let x = place.tensor(&random(1, &[3]));
        for n in SIZES {
            let (zeros, twos) =
                (x.zeros_like(&[n]).expect("memory"), x.full_like(&[n], 2.0).expect("memory"));
            assert_eq!(host(&zeros), vec![0.0; n]);
            assert_eq!(host(&twos), vec![2.0; n]);
            assert_eq!((zeros.device(), twos.dtype()), (place.device, place.dtype));
        }
        assert!(x.to(place.device, Dtype::F16).is_err());
        assert!(x.item().is_err());
    });
}

#[test]
fn storage_is_shared_until_it_is_written() {
    for_each_place(|place| {
        for n in [1, 16, 129, 1025] {
            let (x, y) = (random(1, &[n]), random(2, &[n]));
            let (before, y) = (place.tensor(&x), place.tensor(&y));
            assert!(before.to(place.device, place.dtype).expect("the device works").same_storage(&before));
            let view = before.reshape(&[n, 1]).expect("as many");
            assert!(view.same_storage(&before));
            let mut sum = before.clone();
            sum.add_assign(&y).expect("one place");
            assert!(!sum.same_storage(&before));
            assert_eq!(host(&before), held(place, &x), "the other one changed");
            assert_eq!(host(&view), held(place, &x), "the view changed");
            let values: Vec<f32> = held(place, &x).iter().zip(host(&y)).map(|(x, y)| x + y).collect();
            let values = Tensor::new(&[n], values).expect("as many");
            assert_eq!(host(&sum), held(place, &values));
            // To itself: the operand is the storage that is written.
            let mut double = before.clone();
            double.add_assign(&before).expect("one place");
            let twice =
                Tensor::new(&[n], held(place, &x).iter().map(|x| 2.0 * x).collect()).expect("as many");
            assert_eq!(host(&double), held(place, &twice));
            // Nobody else holds it: written in place.
            let other = double.reshape(&[1, n]).expect("as many");
            drop(double);
            let mut only = other;
            only.add_assign(&y).expect("as many elements");
            assert_eq!(only.shape(), [1, n]);
            assert!(only.add_assign(&y.zeros_like(&[n + 1]).expect("memory")).is_err());
        }
    });
}

#[test]
fn operands_of_two_places_are_refused() {
    let all = places();
    for (i, a) in all.iter().enumerate() {
        for b in &all[..i] {
            let (x, y) = (random(1, &[4]), random(2, &[4]));
            let mut x = a.tensor(&x);
            let y = b.tensor(&y);
            let text = x.add_assign(&y).expect_err("two places").to_string();
            assert!(text.contains("Tensor::to"), "{text}");
            let tape = hywu_kernels::Tape::inference();
            assert!(add(&tape, &Var::constant(x.clone()), &Var::constant(y.clone())).is_err());
            assert!(
                add(&tape, &Var::constant(x.clone()), &Var::constant(y.to_like(&x).expect("works"))).is_ok()
            );
        }
    }
}

#[test]
fn any_thread_may_use_a_device() {
    for_each_place(|place| {
        let x = place.tensor(&random(1, &[1000]));
        let sums = std::thread::scope(|scope| {
            let work = |i: usize| {
                let x = &x;
                scope.spawn(move || {
                    let mut sum = x.clone();
                    (0..i).for_each(|_| sum.add_assign(x).expect("one place"));
                    host(&sum)
                })
            };
            let threads: Vec<_> = [1, 1, 3, 3].map(work).into();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect::<Vec<_>>()
        });
        assert_eq!(sums[0], sums[1]);
        assert_eq!(sums[2], sums[3]);
        assert_eq!(sums[0], host(&x).iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    });
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    let here = places().len() > 1;
    match Device::Cuda(1000).check() {
        Err(Error::NoCudaDevice { ordinal: 1000, count }) if here => {
            assert!(count > 0);
            assert!(matches!(
                Tensor::zeros(&[2]).to(Device::Cuda(count), Dtype::F32),
                Err(Error::NoCudaDevice { .. })
            ));
        }
        Err(_) if !here => {}
        other => panic!("{other:?}"),
    }
    for (text, device) in [("cpu", Device::Cpu), ("cuda", Device::Cuda(0)), ("cuda:3", Device::Cuda(3))] {
        assert_eq!(text.parse::<Device>().expect("a device"), device);
    }
    assert_eq!("auto".parse::<Device>().expect("a device"), if here { Device::Cuda(0) } else { Device::Cpu });
    for text in ["gpu", "cuda:", "cuda:-1", "cuda:x", ""] {
        assert!(text.parse::<Device>().is_err(), "{text}");
    }
}

#[test]
fn a_device_says_what_it_is_and_keeps_time() {
    for place in places() {
        let properties = place.device.properties().expect("the device works");
        assert_eq!(properties.is_some(), place.device != Device::Cpu);
        let Some(properties) = properties else { continue };
        assert!(properties.capability.0 >= 8 && properties.multiprocessors > 0, "{properties:?}");
        let (free, total) = place.device.memory().expect("the device works").expect("a CUDA device");
        assert!(free <= total && total == properties.memory, "{free} of {total}");
        let event = || place.device.event().expect("the device works").expect("a CUDA device");
        let start = event();
        let mut sum = place.tensor(&random(1, &[1000]));
        sum.add_assign(&sum.clone()).expect("one place");
        assert!(event().since(&start).expect("both pass") >= 0.0);
    }
}

/// The error names what was asked for, and the device goes on.
#[test]
fn more_memory_than_there_is_is_an_error() {
    for_each_place(|place| {
        if place.device == Device::Cpu {
            return;
        }
        let x = random(1, &[100]);
        let there = place.tensor(&x);
        let huge = 1 << 45;
        match there.empty_like(&[huge]) {
            Err(Error::OutOfMemory { ordinal: 0, requested, free, total }) => {
                assert_eq!(requested, huge * place.dtype.size());
                assert!(free <= total && total > 0);
            }
            other => panic!("{other:?}"),
        }
        // More bytes than can be counted.
        assert!(there.empty_like(&[usize::MAX / 2, 1]).is_err());
        assert_eq!(host(&there), held(place, &x));
        let mut sum = there.zeros_like(&[100]).expect("memory");
        sum.add_assign(&there).expect("one place");
        assert_eq!(host(&sum), held(place, &x));
    });
}

/// In a process of its own: it fills the device. The emulated driver gets little memory; a real one does not read the variable.
#[test]
fn a_full_device_is_an_error_and_can_be_used_on() {
    if places().len() == 1 {
        return;
    }
    let run = Command::new(env::current_exe().expect("this test"))
        .args(["--exact", "fills_the_device", "--ignored", "--nocapture"])
        .env("HYWU_EMULATOR_MEMORY", (64 << 20).to_string())
        .output()
        .expect("it starts");
    let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "run by a_full_device_is_an_error_and_can_be_used_on"]
fn fills_the_device() {
    // Without `places`: allocations are not guarded, freed pieces are kept.
    let device = Device::Cuda(0);
    let (free, _) = device.memory().expect("the device works").expect("a CUDA device");
    let x = random(1, &[1000]);
    let there = x.to(device, Dtype::F32).expect("memory");
    let piece = [free / 64 / 4, 8];
    let mut held = Vec::new();
    let error = loop {
        match there.empty_like(&piece) {
            Ok(piece) => held.push(piece),
            Err(error) => break error,
        }
        assert!(held.len() <= 8, "more than there is");
    };
    assert!(
        matches!(error, Error::OutOfMemory { requested, .. } if requested == free / 64 / 4 * 8 * 4),
        "{error}"
    );
    assert!(error.to_string().contains("out of memory"), "{error}");
    assert!(held.len() >= 6, "{} pieces of an eighth", held.len());
    // What was there before is good; small things still fit.
    let mut sum = there.clone();
    sum.add_assign(&there).expect("room for so little");
    assert_eq!(sum.to_host().expect("works").data(), x.data().iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    // What was freed can be had again, in the same pieces and in one of another size.
    let count = held.len();
    held.clear();
    held.extend((0..count).map(|_| there.empty_like(&piece).expect("it was free")));
    held.clear();
    let available = || device.available_memory().expect("the device works") as usize;
    assert!(available() >= free / 4 * 3 && available() <= free, "{} of {free}", available());
    there.empty_like(&[free / 4 / 4 * 3]).expect("pieces of other sizes are given back");
    // A limit is as good as an end, and what lies unused counts.
    device.limit_memory(free / 2).expect("the device works");
    let quarter = [free / 4 / 4];
    let first = there.empty_like(&quarter).expect("half of it is allowed");
    assert!(available() <= free / 4, "{} of {free}", available());
    let refused = there.empty_like(&quarter).expect_err("more than half");
    assert!(matches!(refused, Error::OutOfMemory { .. }), "{refused}");
    drop(first);
    there.empty_like(&[free / 4 / 8 * 3]).expect("pieces of other sizes are given back");
    device.limit_memory(usize::MAX).expect("the device works");
    there.empty_like(&[free / 4 / 4 * 3]).expect("there is no limit any more");
    // That is kept for the next tensor, until it is given back.
    let unused = || device.memory().expect("the device works").expect("a CUDA device").0;
    assert!(unused() <= free / 2, "{} of {free}", unused());
    device.trim().expect("the device works");
    assert!(unused() >= free / 4 * 3, "{} of {free}", unused());
    assert_eq!(there.to_host().expect("works").data(), x.data(), "what is in use stays");
}

#[test]
fn more_memory_than_the_system_has_is_an_error() {
    let there = random(1, &[100]);
    let huge = 1 << 50;
    for shape in [&[huge][..], &[usize::MAX, 2]] {
        match there.empty_like(shape) {
            Err(Error::OutOfHostMemory { requested }) => assert!(requested >= 4 * huge),
            other => panic!("{other:?}"),
        }
    }
    assert!(Device::Cpu.available_memory().expect("the CPU") > 0);
    assert_eq!((Device::Cpu.taken(1001), Device::Cuda(0).taken(1001)), (1001, 1024));
}
