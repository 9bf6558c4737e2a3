//! `build-kernels`: compiles every kernel for every architecture and shows what it uses.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use crate::repo::{Options, Repo, Result};
use crate::toolkit;

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    let mut options = Options::new(args);
    let archs = options.value("--arch")?.unwrap_or(toolkit::DEFAULT_ARCHS);
    options.finish()?;
    let archs = toolkit::parse_archs(archs)?;

    let toolkit = repo.toolkit()?;
    println!("{toolkit}");
    let package = repo.kernels();
    let objects = repo.target.join("kernels");
    fs::create_dir_all(&objects)?;
    let mut jobs = Vec::new();
    for source in toolkit::sources(&package)? {
        for arch in &archs {
            let stem = source.file_stem().unwrap_or_default().to_string_lossy();
            let object = objects.join(format!("{stem}.sm_{arch}.o"));
            jobs.push(Job {
                source: source.clone(),
                arch,
                object,
            });
        }
    }
    if jobs.is_empty() {
        return Err("kernels/cuda holds no .cu file".into());
    }

    let mut kernels = Vec::new();
    let outputs = in_parallel(&jobs, |job| job.compile(&toolkit.nvcc, &package));
    for (job, output) in jobs.iter().zip(outputs) {
        let of_source = parse(&output?)?;
        // What ptxas prints has no stated format; a report that is not understood must not pass.
        if of_source.is_empty() && fs::read_to_string(&job.source)?.contains("__global__") {
            let source = job.source.display();
            return Err(format!(
                "ptxas names no kernel of {source}; check what nvcc -Xptxas -v prints"
            )
            .into());
        }
        kernels.extend(of_source);
    }
    let names = demangle(&kernels);
    for (kernel, name) in kernels.iter_mut().zip(names) {
        kernel.name = name;
    }
    kernels.sort_by(|a, b| (&a.name, &a.arch).cmp(&(&b.name, &b.arch)));
    print!("{}", table(&kernels));

    let spilling = kernels.iter().filter(|kernel| kernel.spills()).count();
    println!("{} kernels, {spilling} spilling", kernels.len());
    if spilling > 0 {
        return Err(
            "kernels spill registers: give them fewer live values or more registers".into(),
        );
    }
    Ok(())
}

/// One source for one architecture.
struct Job<'a> {
    source: PathBuf,
    arch: &'a str,
    object: PathBuf,
}

impl Job<'_> {
    /// Returns what ptxas reports.
    fn compile(&self, nvcc: &Path, package: &Path) -> Result<String, String> {
        let output = Command::new(nvcc)
            .args(toolkit::FLAGS)
            .args(toolkit::gencode(self.arch))
            .args(
                toolkit::includes(package)
                    .iter()
                    .flat_map(|dir| [Path::new("-I"), dir]),
            )
            .args(["-Xptxas", "-v", "-Werror", "all-warnings", "-c", "-o"])
            .args([&self.object, &self.source])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("{}: {error}", nvcc.display()))?;
        let report = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            return Ok(report);
        }
        let stdout = String::from_utf8_lossy(&output.stdout);
        let source = self.source.display();
        Err(format!(
            "{source} does not compile for sm_{}\n{stdout}{report}",
            self.arch
        ))
    }
}

/// Runs `work` on every job, as many at a time as there are cores, and keeps the order.
fn in_parallel<J: Sync, R: Send>(jobs: &[J], work: impl Fn(&J) -> R + Sync) -> Vec<R> {
    let next = Mutex::new(jobs.iter().enumerate());
    let done = Mutex::new(Vec::new());
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..cores.min(jobs.len()) {
            scope.spawn(|| {
                loop {
                    let job = next.lock().unwrap().next();
                    let Some((index, job)) = job else { break };
                    let result = work(job);
                    done.lock().unwrap().push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// What ptxas says of one kernel on one architecture.
#[derive(Debug, Default, PartialEq, Eq)]
struct Kernel {
    name: String,
    arch: String,
    registers: u32,
    stack: u32,
    spill_stores: u32,
    spill_loads: u32,
    shared: u32,
}

impl Kernel {
    fn spills(&self) -> bool {
        self.spill_stores + self.spill_loads > 0
    }
}

/// Reads `-Xptxas -v`. Functions that are called and not inlined count towards the kernel before
/// them: their spills are as bad.
fn parse(report: &str) -> Result<Vec<Kernel>, String> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in report.lines() {
        if let Some(entry) = line.split_once("Compiling entry function '") {
            let mut quoted = entry.1.split('\'');
            let (Some(name), Some(arch)) = (quoted.next(), quoted.nth(1)) else {
                return Err(format!("ptxas says something new: {line}"));
            };
            kernels.push(Kernel {
                name: name.into(),
                arch: arch.into(),
                ..Kernel::default()
            });
        }
        let Some(kernel) = kernels.last_mut() else {
            continue;
        };
        if line.contains("bytes stack frame") {
            kernel.stack += number_before(line, " bytes stack frame")?;
            kernel.spill_stores += number_before(line, " bytes spill stores")?;
            kernel.spill_loads += number_before(line, " bytes spill loads")?;
        }
        if line.contains(": Used ") {
            kernel.registers = number_before(line, " registers")?;
            if line.contains(" bytes smem") {
                kernel.shared = number_before(line, " bytes smem")?;
            }
        }
    }
    Ok(kernels)
}

fn number_before(line: &str, unit: &str) -> Result<u32, String> {
    let (before, _) = line.split_once(unit).unwrap_or_default();
    let digits = before
        .rsplit(|c: char| !c.is_ascii_digit())
        .next()
        .unwrap_or_default();
    digits
        .parse()
        .map_err(|_| format!("ptxas says something new: {line}"))
}

/// Readable names, in order, where the machine has `c++filt`.
fn demangle(kernels: &[Kernel]) -> Vec<String> {
    let mangled: String = kernels
        .iter()
        .map(|kernel| kernel.name.clone() + "\n")
        .collect();
    let filtered = || -> Option<String> {
        let mut child = Command::new("c++filt")
            .arg("--no-params")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        child.stdin.take()?.write_all(mangled.as_bytes()).ok()?;
        String::from_utf8(child.wait_with_output().ok()?.stdout).ok()
    };
    let readable = filtered().unwrap_or_else(|| mangled.clone());
    readable
        .lines()
        .map(|name| name.replace("(anonymous namespace)::", ""))
        .collect()
}

fn table(kernels: &[Kernel]) -> String {
    let width = kernels
        .iter()
        .map(|kernel| kernel.name.len())
        .max()
        .unwrap_or(0)
        .max(6);
    let mut table = format!(
        "{:width$}  {:7}  registers  spill stores  spill loads  stack  shared\n",
        "kernel", "arch"
    );
    for kernel in kernels {
        let Kernel {
            name,
            arch,
            registers,
            stack,
            spill_stores,
            spill_loads,
            shared,
        } = kernel;
        let _ = writeln!(
            table,
            "{name:width$}  {arch:7}  {registers:9}  {spill_stores:12}  {spill_loads:11}  \
             {stack:5}  {shared:6}"
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_90a'
ptxas info    : Function properties for _Z4copyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 2.813 ms
ptxas info    : Compiling entry function '_Z3sumPf' for 'sm_90a'
ptxas info    : Function properties for _Z3sumPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : Function properties for _Z6helperf
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
";

    #[test]
    fn resources_are_read_from_the_report_of_ptxas() {
        let kernels = parse(REPORT).unwrap();
        assert_eq!(
            kernels,
            [
                Kernel {
                    name: "_Z4copyPf".into(),
                    arch: "sm_90a".into(),
                    registers: 10,
                    shared: 512,
                    ..Kernel::default()
                },
                Kernel {
                    name: "_Z3sumPf".into(),
                    arch: "sm_90a".into(),
                    registers: 255,
                    stack: 24,
                    spill_stores: 12,
                    spill_loads: 16,
                    shared: 0,
                },
            ]
        );
        assert!(!kernels[0].spills());
        assert!(kernels[1].spills());
    }

    #[test]
    fn a_report_that_cannot_be_read_is_an_error() {
        let changed = REPORT.replace("512 bytes smem", "many bytes smem");
        assert!(parse(&changed).is_err());
    }

    #[test]
    fn the_table_has_one_line_for_each_kernel_and_lines_up() {
        let table = table(&parse(REPORT).unwrap());
        let widths: Vec<_> = table.lines().map(str::len).collect();
        assert_eq!(widths.len(), 3);
        assert!(widths.iter().all(|width| *width == widths[0]), "{table}");
    }

    #[test]
    fn parallel_work_keeps_its_order() {
        let jobs: Vec<u32> = (0..100).collect();
        assert_eq!(
            in_parallel(&jobs, |job| job * 2),
            jobs.iter().map(|j| j * 2).collect::<Vec<_>>()
        );
    }
}
