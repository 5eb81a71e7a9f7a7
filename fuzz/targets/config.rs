//! Any bytes as a generator's `config.json`.

#![no_main]

use hywu_generator::GeneratorConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let config = match GeneratorConfig::from_json(text) {
        Err(e) => return hywu_fuzz::check_error(e),
        Ok(config) => config,
    };
    // It was checked as a whole: nothing that follows from it can fail or overflow.
    let spec = config.spec().expect("a good config");
    let weights = config.weights().expect("a good config");
    let numbers = |shape: &[usize]| shape.iter().try_fold(1usize, |n, &x| n.checked_mul(x));
    assert!(weights.iter().all(|(_, shape)| numbers(shape).is_some_and(|n| n > 0)));
    let area = config.rank * config.token_dim;
    let parameters = spec.parameters();
    assert_eq!(parameters.len(), 2 * spec.modules.len());
    let tokens: usize = parameters.iter().map(|p| p.tokens(area)).sum();
    let codes = weights.iter().find(|(name, _)| name == "model.hw_pos.weight").expect("there");
    assert_eq!(codes.1[0], tokens * config.rank);
    // What is written is read again.
    let written = serde_json::to_vec(&config).expect("finite numbers");
    assert_eq!(GeneratorConfig::from_json(&written).expect("what was just written"), config);
});
