//! Fakes of the vendor's libraries, compiled with the system's C compiler when a test wants one.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, io, process};

/// A folder with one fake library and the journal of its calls, removed with this value.
#[derive(Debug)]
pub(crate) struct Fake {
    folder: PathBuf,
}

impl Fake {
    /// Compiles a fake libcuda. `None`, with a note, only where there is no C compiler: nothing
    /// written in Rust links without one, so this binary was built elsewhere.
    pub(crate) fn libcuda(defines: &[&str]) -> Option<Self> {
        let defaults = ["DEVICES=2", "CURRENT=0", "FD=-2", "UNKNOWN_ATTRIBUTE=-1"];
        Self::compile(include_str!("libcuda.c"), &defaults, defines)
    }

    /// Compiles a fake NVML.
    pub(crate) fn libnvml(defines: &[&str]) -> Option<Self> {
        Self::compile(
            include_str!("libnvml.c"),
            &["KNOWS=3", "NVLINK=0", "P2P=0"],
            defines,
        )
    }

    fn compile(source: &str, defaults: &[&str], defines: &[&str]) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = env::temp_dir().join(format!("ep-sys-fake-{}-{number}", process::id()));
        fs::create_dir_all(&folder).unwrap();
        let fake = Self { folder };
        fs::write(fake.folder.join("fake.h"), include_str!("fake.h")).unwrap();
        fs::write(fake.folder.join("fake.c"), source).unwrap();
        fs::write(fake.journal_path(), "").unwrap();

        let name = |define: &str| define.split('=').next().unwrap_or_default().to_owned();
        let journal = format!("JOURNAL=\"{}\"", fake.journal_path().display());
        let defaults = ["FAIL=\"\"", "STATUS=0", &journal]
            .into_iter()
            .chain(defaults.iter().copied())
            .filter(|default| !defines.iter().any(|define| name(define) == name(default)));
        let output = Command::new("cc")
            .args(["-std=gnu11", "-shared", "-fPIC", "-Wall", "-Werror", "-o"])
            .arg(fake.library())
            .args(
                defaults
                    .chain(defines.iter().copied())
                    .map(|define| format!("-D{define}")),
            )
            .arg(fake.folder.join("fake.c"))
            .output();
        match output {
            Ok(output) => {
                let errors = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{errors}");
                Some(fake)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                eprintln!("skipped: no C compiler (cc) on this machine");
                None
            }
            Err(error) => panic!("cc: {error}"),
        }
    }

    /// The library's path, for the loader. Leaked: the driver keeps NVML's for the process's life.
    pub(crate) fn library(&self) -> &'static OsStr {
        self.folder.join("fake.so").into_os_string().leak()
    }

    /// The calls since the last time, one per line, and forgets them.
    pub(crate) fn journal(&self) -> Vec<String> {
        let text = fs::read_to_string(self.journal_path()).unwrap();
        fs::write(self.journal_path(), "").unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn journal_path(&self) -> PathBuf {
        self.folder.join("journal")
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
