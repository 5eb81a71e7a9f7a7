//! With the feature `cuda`: compiles each kernels-cu/<op>/<op>.cu to one fatbin and writes OUT_DIR/kernels.rs, a table of them.
//!
//! | variable | meaning |
//! |---|---|
//! | `HYWU_NVCC` | the compiler to use; an error when it is not a file. Unset: `CUDA_HOME/bin/nvcc`, then PATH |
//! | `HYWU_REQUIRE_NVCC=1` | no compiler is an error; else it is one warning and an empty table |
//! | `HYWU_CUDA_ARCH=80,90a` | the targets: machine code for each, PTX for the lowest that has no suffix letter |
use std::collections::{BTreeMap, BTreeSet, hash_map::DefaultHasher};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::SystemTime;
use std::{env, fs, sync::Mutex, thread};

/// What this script reads from the environment, PATH apart (see `find_nvcc`).
const VARIABLES: [&str; 4] = ["HYWU_NVCC", "HYWU_REQUIRE_NVCC", "HYWU_CUDA_ARCH", "CUDA_HOME"];
/// What nvcc itself reads: it changes the machine code without changing our arguments.
const NVCC_VARIABLES: [&str; 3] = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"];
const DEFAULT_ARCH: &str = "80,90a";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            // One directive per line of text, as a directive ends with its line.
            text.lines().for_each(|line| println!("cargo::error={line}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    for name in VARIABLES.iter().chain(&NVCC_VARIABLES) {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let of_cargo = |name| variable(name).ok_or(format!("{name} is not set: this runs under cargo"));
    let (out, here) = (PathBuf::from(of_cargo("OUT_DIR")?), of_cargo("CARGO_MANIFEST_DIR")?);

    let Some(nvcc) = find_nvcc()? else {
        let text = "nvcc not found (HYWU_NVCC, CUDA_HOME/bin, PATH)";
        if variable("HYWU_REQUIRE_NVCC").is_some_and(|v| v != "0") {
            return Err(format!("{text}, and HYWU_REQUIRE_NVCC is set"));
        }
        println!("cargo::warning={text}: built without CUDA kernels; scripts/install_nvcc.sh installs one");
        println!("cargo::rustc-env=HYWU_NVCC_RELEASE=");
        return write_table(&out, &[]);
    };
    let release = release_of(&nvcc)?;
    println!("cargo::rerun-if-changed={}", nvcc.display());
    println!("cargo::rustc-env=HYWU_NVCC_RELEASE={release}");

    let root = Path::new(&here).join("../kernels-cu");
    let root = fs::canonicalize(&root).map_err(|e| format!("{}: {e}", root.display()))?;
    // cargo looks through the whole folder, so a new op or a new header is seen too.
    println!("cargo::rerun-if-changed={}", root.display());
    let ops = find_ops(&root)?;
    let archs = variable("HYWU_CUDA_ARCH").unwrap_or(DEFAULT_ARCH.into());
    println!("cargo::rustc-env=HYWU_CUDA_ARCHS={archs}");
    let targets = targets(&archs)?;
    let build = Build { nvcc, release, targets, root, out };

    let mut errors = String::new();
    for result in build.compile_all(&ops) {
        match result {
            // Headers outside the folder; the system's and nvcc's own come with the release.
            Ok(read) => read
                .iter()
                .filter(|path| build.tracked(path))
                .for_each(|path| println!("cargo::rerun-if-changed={}", path.display())),
            Err(text) => errors += &text,
        }
    }
    if errors.is_empty() { write_table(&build.out, &ops) } else { Err(errors) }
}

/// A variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The real file behind `path`: nvcc looks for its parts beside argv[0] and does not follow a symbolic link itself.
fn real_file(path: PathBuf) -> Option<PathBuf> {
    fs::canonicalize(path).ok().filter(|path| path.is_file())
}

fn find_nvcc() -> Result<Option<PathBuf>, String> {
    if let Some(path) = variable("HYWU_NVCC") {
        return match real_file(PathBuf::from(&path)) {
            Some(nvcc) => Ok(Some(nvcc)),
            None => Err(format!("HYWU_NVCC={path} is not a file")),
        };
    }
    if let Some(nvcc) = variable("CUDA_HOME").and_then(|home| real_file(Path::new(&home).join("bin/nvcc"))) {
        return Ok(Some(nvcc));
    }
    // Named only when it is searched: PATH differs between a shell and an editor, and each change would build anew.
    println!("cargo::rerun-if-env-changed=PATH");
    let path = env::var_os("PATH").unwrap_or_default();
    Ok(env::split_paths(&path).find_map(|folder| real_file(folder.join("nvcc"))))
}

/// "13.0.88" from "Cuda compilation tools, release 13.0, V13.0.88".
fn release_of(nvcc: &Path) -> Result<String, String> {
    let run = Command::new(nvcc).arg("--version").output();
    let run = run.map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&run.stdout);
    let release = text.lines().find_map(|line| line.split_once("release ")?.1.split_once(", V"));
    match release {
        Some((_, release)) => Ok(release.trim().to_owned()),
        None => Err(format!("{} --version names no release:\n{text}", nvcc.display())),
    }
}

/// Every folder that holds a .cu of its own name, so neither `common` nor `emulator`.
fn find_ops(root: &Path) -> Result<Vec<String>, String> {
    let failed = |e| format!("{}: {e}", root.display());
    let mut ops = Vec::new();
    for entry in fs::read_dir(root).map_err(failed)? {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string()
            && source(root, &name).is_file()
        {
            ops.push(name);
        }
    }
    ops.sort();
    Ok(ops)
}

fn source(root: &Path, op: &str) -> PathBuf {
    root.join(op).join(format!("{op}.cu"))
}

/// -gencode options for "80,90a". Spelt out, as -arch=sm_90a also makes a plain compute_90 pass, which rejects wgmma.
fn targets(list: &str) -> Result<Vec<String>, String> {
    let mut archs = Vec::new();
    for arch in list.split(',').map(str::trim) {
        let digits = arch.trim_end_matches(['a', 'f']);
        match digits.parse::<u32>() {
            Ok(number) if arch.len() - digits.len() <= 1 => archs.push((number, arch)),
            _ => return Err(format!("HYWU_CUDA_ARCH={list}: {arch:?} is not like 80, 90a or 100a")),
        }
    }
    archs.sort();
    archs.dedup();
    // PTX of an architecture with a letter runs on that one alone, so it would add nothing to its machine code.
    let portable = archs.iter().find(|(number, arch)| number.to_string() == *arch).copied();
    let option = |&(number, arch): &(u32, &str)| {
        let ptx = if portable == Some((number, arch)) { format!(",compute_{arch}") } else { String::new() };
        format!("-gencode=arch=compute_{arch},code=[sm_{arch}{ptx}]")
    };
    Ok(archs.iter().map(option).collect())
}

struct Build {
    nvcc: PathBuf,
    release: String,
    targets: Vec<String>,
    /// kernels-cu
    root: PathBuf,
    out: PathBuf,
}

impl Build {
    /// For each op, in order: the files that its compilation read, or why it failed.
    fn compile_all(&self, ops: &[String]) -> Vec<Result<Vec<PathBuf>, String>> {
        let jobs = variable("NUM_JOBS").and_then(|n| n.parse().ok()).unwrap_or(1).clamp(1, ops.len().max(1));
        let (queue, results) = (Mutex::new(ops.iter()), Mutex::new(BTreeMap::new()));
        // A closure of its own, so that the queue is free again while the kernel compiles.
        let next = || queue.lock().unwrap_or_else(|e| e.into_inner()).next();
        let worker = || {
            while let Some(op) = next() {
                let result = self.compile(op);
                results.lock().unwrap_or_else(|e| e.into_inner()).insert(op, result);
            }
        };
        thread::scope(|scope| (0..jobs).for_each(|_| drop(scope.spawn(worker))));
        results.into_inner().unwrap_or_else(|e| e.into_inner()).into_values().collect()
    }

    /// Compiles one op, unless its stamp says that nothing it was made from has changed: cargo runs the whole script
    /// again for one changed file.
    fn compile(&self, op: &str) -> Result<Vec<PathBuf>, String> {
        let file = |extension| self.out.join(format!("{op}.{extension}"));
        let (fatbin, list, stamp) = (file("fatbin"), file("d"), file("stamp"));
        let source = source(&self.root, op);
        let mut command = Command::new(&self.nvcc);
        command.args(["-fatbin", "-std=c++17", "-O3", "-lineinfo"]).args(&self.targets);
        command.arg("-I").arg(&self.root).arg("-I").arg(self.root.join("common"));
        command.args(["-MD", "-MF"]).arg(&list).arg("-o").arg(&fatbin).arg(&source);

        if let (Ok(old), Ok(read)) = (fs::read_to_string(&stamp), dependencies(&list))
            && fatbin.is_file()
            && self.stamp(&command, &read) == Some(old)
        {
            return Ok(read);
        }
        let _ = fs::remove_file(&stamp); // It may be absent; a failed compilation must not leave an old one.
        let started = SystemTime::now();
        let run = command.output().map_err(|e| format!("{}: {e}\n", self.nvcc.display()))?;
        let text = String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned();
        if !run.status.success() {
            return Err(format!("nvcc failed on {} ({})\n{text}", source.display(), run.status));
        }
        // A set: a warning comes again for every target.
        let is_warning = |line: &&str| line.contains("warning ") || line.contains("warning:");
        for line in text.lines().filter(is_warning).collect::<BTreeSet<_>>() {
            println!("cargo::warning={line}");
        }
        let read = dependencies(&list)?;
        // A file that changed meanwhile may be newer than what nvcc saw of it: no stamp, so it is compiled again.
        let written = |path| fs::metadata(path).and_then(|m| m.modified()).unwrap_or(started);
        if read.iter().all(|path| written(path) <= started)
            && let Some(text) = self.stamp(&command, &read)
        {
            fs::write(&stamp, text).map_err(|e| format!("{}: {e}\n", stamp.display()))?;
        }
        Ok(read)
    }

    /// A hash of all that the fatbin is made from; none when a file of it is gone.
    fn stamp(&self, command: &Command, read: &[PathBuf]) -> Option<String> {
        let mut hasher = DefaultHasher::new();
        self.release.hash(&mut hasher);
        command.get_args().for_each(|argument| argument.hash(&mut hasher));
        NVCC_VARIABLES.map(env::var_os).hash(&mut hasher);
        for path in read {
            path.hash(&mut hasher);
            fs::read(path).ok()?.hash(&mut hasher);
        }
        Some(format!("{:016x}", hasher.finish()))
    }

    fn tracked(&self, path: &Path) -> bool {
        let toolkit = self.nvcc.parent().and_then(Path::parent).unwrap_or(&self.nvcc);
        !path.starts_with("/usr") && !path.starts_with(toolkit)
    }
}

/// The files named by "x.fatbin : a.cu \<newline> b.cuh", as nvcc -MD writes it; "\ " is a space inside a name.
fn dependencies(list: &Path) -> Result<Vec<PathBuf>, String> {
    let text = fs::read_to_string(list).map_err(|e| format!("{}: {e}\n", list.display()))?;
    let text = text.replace("\\\n", " ").replace("\\ ", "\0");
    let (_, files) = text.split_once(" : ").ok_or(format!("{}: not a list of files\n", list.display()))?;
    Ok(files.split_whitespace().map(|name| PathBuf::from(name.replace('\0', " "))).collect())
}

fn write_table(out: &Path, ops: &[String]) -> Result<(), String> {
    let mut text = String::from("pub(crate) static FATBINS: &[(&str, &[u8])] = &[\n");
    for op in ops {
        text += &format!("    ({op:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{op}.fatbin\"))),\n");
    }
    let path = out.join("kernels.rs");
    fs::write(&path, text + "];\n").map_err(|e| format!("{}: {e}", path.display()))
}
