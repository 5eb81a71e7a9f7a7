//! The folder of a measurement: what is finished is there, and isn't done again.

use anyhow::{Context, Result, bail};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Longest file of numbers, in bytes.
const MOST: u64 = 1 << 28;

/// A folder of finished parts.
pub struct Folder(PathBuf);

impl Folder {
    /// Opens or makes the folder of the measurement that `given` tells from others.
    ///
    /// # Errors
    /// A folder that can't be written, or that holds another measurement.
    pub fn open(path: &Path, given: &impl Serialize) -> Result<Self> {
        fs::create_dir_all(path).map_err(|e| hywu_core::Error::io(path, e))?;
        let folder = Self(path.to_owned());
        let given = serde_json::to_value(given)?;
        let known: serde_json::Value = folder.once("given.json", || Ok(given.clone()))?;
        if known != given {
            bail!(
                "{}: another measurement is in this folder; its settings, photos and model are not these",
                folder.path("given.json").display()
            );
        }
        Ok(folder)
    }

    /// Where a part is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The part of this name: read where it is there, else made and kept.
    ///
    /// # Errors
    /// Those of `make`; a file that is damaged or can't be written.
    pub fn once<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let path = self.path(name);
        if path.exists() {
            let text = hywu_core::read_small(&path, MOST)?;
            let broken = || format!("{}: damaged; without it this part is measured again", path.display());
            return serde_json::from_slice(&text).with_context(broken);
        }
        let made = make()?;
        self.write(name, &made)?;
        Ok(made)
    }

    /// Writes a part.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn write(&self, name: &str, part: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(part)?;
        text.push(b'\n');
        self.make_room(name)?;
        Ok(hywu_core::write_atomic(self.path(name), |w| w.write_all(&text))?)
    }

    /// Makes the folders above a part.
    ///
    /// # Errors
    /// A folder that can't be written.
    pub fn make_room(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        let parent = path.parent().unwrap_or(&self.0);
        Ok(fs::create_dir_all(parent).map_err(|e| hywu_core::Error::io(parent, e))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_made_once() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let open = |given: &str| Folder::open(dir.path(), &given);
        let made = |folder: &Folder, value: i32| folder.once("a/part.json", || Ok(value));
        let folder = open("this").expect("a new one");
        assert!(folder.once::<i32>("a/part.json", || bail!("it fails")).is_err());
        assert_eq!(made(&folder, 3).expect("made"), 3);
        assert_eq!(made(&open("this").expect("the same"), 4).expect("kept"), 3);
        assert!(open("that").map(|_| ()).expect_err("another").to_string().contains("another measurement"));
        fs::write(folder.path("a/part.json"), "{").expect("writable");
        assert!(format!("{:#}", made(&folder, 5).expect_err("damaged")).contains("part.json"));
    }
}
