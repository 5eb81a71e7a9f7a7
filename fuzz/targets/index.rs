//! Any bytes as `model.safetensors.index.json`.

#![no_main]

use hywu_core::Index;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|text: &[u8]| {
    match Index::parse("index.json", text) {
        Err(e) => hywu_fuzz::check_error(e),
        Ok(index) => {
            let shards = index.shards();
            assert_eq!(shards.values().map(Vec::len).sum::<usize>(), index.weight_map.len());
            for name in shards.keys() {
                // A file in this very folder, by any reading of its name.
                let path = Path::new("/folder").join(name);
                assert_eq!(path.parent(), Some(Path::new("/folder")), "{name:?}");
                assert!(!name.contains(['/', '\\', '\0']) && *name != "..", "{name:?}");
            }
        }
    }
});
