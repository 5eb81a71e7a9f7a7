//! Alone in its process: what is removed belongs to whoever is writing there.

use hywu_core::{AtomicFile, Error, create_folder_atomic, remove_temporaries, write_atomic};
use std::{fs, io::Write};

#[test]
fn what_has_not_appeared_can_be_removed() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let count = || fs::read_dir(dir.path()).expect("readable").count();
    let mut file = AtomicFile::create(dir.path().join("x")).expect("writable");
    file.write_all(b"half").expect("writable");
    create_folder_atomic(dir.path().join("folder"), |made| -> Result<(), Error> {
        fs::write(made.join("inside"), "half").expect("writable");
        assert_eq!(count(), 2);
        remove_temporaries();
        assert_eq!(count(), 0);
        Err(Error::Interrupted)
    })
    .expect_err("it is gone");
    write_atomic(dir.path().join("y"), |w| w.write_all(b"whole")).expect("writable");
    remove_temporaries();
    assert_eq!(fs::read(dir.path().join("y")).expect("there"), b"whole");
}
