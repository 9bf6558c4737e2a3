//! Memory shared between real processes: on the simulator always, on the first GPU of this host where
//! there is one.
//!
//! A test starts its own executable again, with a task in the environment. The child does the task
//! with a driver of its own; its exit status says how it went.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use ep_sim::{Cluster, SimDriver};
use ep_sys::vmm::{DeviceMemory, IpcMapping, Mapping, Physical};
use ep_sys::{CudaDriver, DeviceOrdinal, DevicePtr, Driver, HandleKind, ShareableHandle, Status};

const TASK: &str = "EP_SIM_TEST_TASK";
const DEVICE: DeviceOrdinal = DeviceOrdinal(0);
const GRANULE: u64 = 2 << 20;

/// The driver of a rank in a rack of two nodes with 4 GPUs, or of this host's GPUs.
fn driver(name: &str) -> Arc<dyn Driver> {
    match name.strip_prefix("sim") {
        Some(rank) => {
            let cluster = Cluster::gb200_nvl72(2);
            SimDriver::for_rank(&cluster, rank.parse().unwrap()).unwrap()
        }
        None => CudaDriver::load().unwrap(),
    }
}

/// Whether this host has a GPU. Says why not; under `EP_GPU=require` there must be one.
fn gpu_is_here() -> bool {
    match CudaDriver::load() {
        Ok(_) => true,
        Err(error) if std::env::var("EP_GPU").as_deref() == Ok("require") => {
            panic!("EP_GPU=require: {error}");
        }
        Err(error) => {
            eprintln!("skipped: {error}");
            false
        }
    }
}

/// In a child: what to do.
fn task() -> Option<Vec<String>> {
    let task = std::env::var(TASK).ok()?;
    Some(task.split(' ').map(str::to_owned).collect())
}

/// This executable again, for one test and with a task.
fn child(test: &str, task: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env(TASK, task.join(" "));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn succeed(mut command: Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "the child failed: {output:?}");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("1 passed"), "the child ran no test: {told}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> [u8; N] {
    assert_eq!(text.len(), 2 * N);
    std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
}

fn read<const N: usize>(driver: &Arc<dyn Driver>, ptr: DevicePtr) -> [u8; N] {
    let mut out = [0; N];
    driver.copy_to_host(DEVICE, &mut out, ptr).unwrap();
    out
}

/// The child's part of a conversation: reads the question, writes the answer behind it.
fn answer(driver: &Arc<dyn Driver>, ptr: DevicePtr) {
    assert_eq!(&read::<8>(driver, ptr), b"question");
    driver
        .copy_to_device(DEVICE, ptr.offset(GRANULE - 6), b"answer")
        .unwrap();
}

#[test]
fn ipc() {
    ipc_between("ipc", "sim0", "sim1");
}

#[test]
fn ipc_on_a_gpu() {
    if gpu_is_here() {
        ipc_between("ipc_on_a_gpu", "cuda", "cuda");
    }
}

fn ipc_between(test: &str, here: &str, there: &str) {
    if let Some(task) = task() {
        let driver = driver(&task[0]);
        let mapping = IpcMapping::open(&driver, DEVICE, &unhex(&task[1])).unwrap();
        answer(&driver, mapping.ptr());
        return mapping.close().unwrap();
    }
    let driver = driver(here);
    let memory = DeviceMemory::new(&driver, DEVICE, GRANULE).unwrap();
    driver
        .copy_to_device(DEVICE, memory.ptr(), b"question")
        .unwrap();
    succeed(child(test, &[there, &hex(&memory.ipc_handle().unwrap())]));
    assert_eq!(
        &read::<6>(&driver, memory.ptr().offset(GRANULE - 6)),
        b"answer"
    );
    memory.close().unwrap();
}

#[test]
fn descriptors() {
    descriptors_between("descriptors", "sim0", "sim1");
}

#[test]
fn descriptors_on_a_gpu() {
    if gpu_is_here() {
        descriptors_between("descriptors_on_a_gpu", "cuda", "cuda");
    }
}

fn descriptors_between(test: &str, here: &str, there: &str) {
    if let Some(task) = task() {
        let driver = driver(&task[0]);
        // The descriptor arrived as standard input.
        let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        let handle = ShareableHandle::PosixFd(fd);
        let imported = Physical::import(&driver, DEVICE, &handle, GRANULE).unwrap();
        let mapping = Mapping::new(imported, 0).unwrap();
        answer(&driver, mapping.ptr());
        return mapping.close().unwrap();
    }
    let driver = driver(here);
    let physical = Physical::create(&driver, DEVICE, GRANULE, HandleKind::PosixFd, false).unwrap();
    let ShareableHandle::PosixFd(fd) = physical.export(HandleKind::PosixFd).unwrap() else {
        panic!("a descriptor");
    };
    let mapping = Mapping::new(physical, 0).unwrap();
    driver
        .copy_to_device(DEVICE, mapping.ptr(), b"question")
        .unwrap();
    let mut command = child(test, &[there]);
    command.stdin(fd);
    succeed(command);
    assert_eq!(
        &read::<6>(&driver, mapping.ptr().offset(GRANULE - 6)),
        b"answer"
    );
    mapping.close().unwrap();
}

#[test]
fn fabric_across_nodes() {
    if let Some(task) = task() {
        let driver = driver(&task[0]);
        let handle = ShareableHandle::Fabric(unhex(&task[1]));
        let imported = Physical::import(&driver, DEVICE, &handle, GRANULE).unwrap();
        let mapping = Mapping::new(imported, 0).unwrap();
        answer(&driver, mapping.ptr());
        return mapping.close().unwrap();
    }
    let driver = driver("sim0");
    let physical = Physical::create(&driver, DEVICE, GRANULE, HandleKind::Fabric, false).unwrap();
    let ShareableHandle::Fabric(handle) = physical.export(HandleKind::Fabric).unwrap() else {
        panic!("a fabric handle");
    };
    let mapping = Mapping::new(physical, 0).unwrap();
    driver
        .copy_to_device(DEVICE, mapping.ptr(), b"question")
        .unwrap();
    succeed(child("fabric_across_nodes", &["sim4", &hex(&handle)]));
    assert_eq!(
        &read::<6>(&driver, mapping.ptr().offset(GRANULE - 6)),
        b"answer"
    );
}

#[test]
fn identities_are_the_same_in_every_process() {
    if let Some(task) = task() {
        let driver = driver(&task[0]);
        assert_eq!(driver.host_facts().host_id.to_string(), task[1]);
        return assert_eq!(
            driver.device_info(DEVICE).unwrap().uuid.to_string(),
            task[2]
        );
    }
    let driver = driver("sim5");
    let host = driver.host_facts().host_id.to_string();
    let uuid = driver.device_info(DEVICE).unwrap().uuid.to_string();
    succeed(child(
        "identities_are_the_same_in_every_process",
        &["sim5", &host, &uuid],
    ));
}

/// A process that has made memory, said so, and waits to be ended.
struct Maker {
    child: Child,
    fabric: [u8; 64],
    ipc: [u8; 64],
}

impl Maker {
    /// The child's part.
    fn work(task: &[String]) {
        let driver = driver(&task[0]);
        let physical =
            Physical::create(&driver, DEVICE, GRANULE, HandleKind::Fabric, false).unwrap();
        let ShareableHandle::Fabric(fabric) = physical.export(HandleKind::Fabric).unwrap() else {
            panic!("a fabric handle");
        };
        let mapping = Mapping::new(physical, 0).unwrap();
        let plain = DeviceMemory::new(&driver, DEVICE, GRANULE).unwrap();
        for ptr in [mapping.ptr(), plain.ptr()] {
            driver.copy_to_device(DEVICE, ptr, b"question").unwrap();
        }
        println!(
            "\nmade {} {}",
            hex(&fabric),
            hex(&plain.ipc_handle().unwrap())
        );
        std::io::stdout().flush().unwrap();
        // Until the parent closes its end, or kills.
        let mut nothing = String::new();
        std::io::stdin().read_line(&mut nothing).unwrap();
    }

    fn start(test: &str) -> Self {
        let mut command = child(test, &["sim0"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = lines
            .map(|line| line.unwrap())
            .find(|line| line.starts_with("made "))
            .expect("the child says what it made");
        let mut handles = line.split(' ').skip(1);
        let fabric = unhex(handles.next().unwrap());
        let ipc = unhex(handles.next().unwrap());
        Self { child, fabric, ipc }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_killed_maker_leaves_what_is_mapped() {
    if let Some(task) = task() {
        return Maker::work(&task);
    }
    let mut maker = Maker::start("a_killed_maker_leaves_what_is_mapped");
    let driver = driver("sim1");
    let handle = ShareableHandle::Fabric(maker.fabric);
    let imported = Physical::import(&driver, DEVICE, &handle, GRANULE).unwrap();
    let mapping = Mapping::new(imported, 0).unwrap();
    let opened = IpcMapping::open(&driver, DEVICE, &maker.ipc).unwrap();
    maker.kill();
    for ptr in [mapping.ptr(), opened.ptr()] {
        answer(&driver, ptr);
        assert_eq!(&read::<6>(&driver, ptr.offset(GRANULE - 6)), b"answer");
    }
    mapping.close().unwrap();
    opened.close().unwrap();
}

/// What CUDA leaves undefined, and a group relies on that a rank has left without closing: memory that
/// is freed while another process has it open stays that process's.
#[test]
fn memory_that_is_freed_stays_with_those_who_opened_it() {
    freed_while_open(
        "memory_that_is_freed_stays_with_those_who_opened_it",
        "sim0",
        "sim1",
    );
}

#[test]
fn memory_that_is_freed_stays_with_those_who_opened_it_on_a_gpu() {
    if gpu_is_here() {
        freed_while_open(
            "memory_that_is_freed_stays_with_those_who_opened_it_on_a_gpu",
            "cuda",
            "cuda",
        );
    }
}

fn freed_while_open(test: &str, here: &str, there: &str) {
    let mut said = String::new();
    if let Some(task) = task() {
        let driver = driver(&task[0]);
        let memory = DeviceMemory::new(&driver, DEVICE, GRANULE).unwrap();
        driver
            .copy_to_device(DEVICE, memory.ptr(), b"question")
            .unwrap();
        println!("\nmade {}", hex(&memory.ipc_handle().unwrap()));
        std::io::stdin().read_line(&mut said).unwrap();
        memory.close().unwrap();
        let others = [(); 4].map(|()| DeviceMemory::new(&driver, DEVICE, GRANULE).unwrap());
        let pattern = vec![0x55; GRANULE as usize];
        for other in &others {
            driver
                .copy_to_device(DEVICE, other.ptr(), &pattern)
                .unwrap();
        }
        println!("freed");
        std::io::stdin().read_line(&mut said).unwrap();
        for other in &others {
            let mut bytes = vec![0; GRANULE as usize];
            driver
                .copy_to_host(DEVICE, &mut bytes, other.ptr())
                .unwrap();
            assert!(bytes == pattern);
        }
        return;
    }
    let mut command = child(test, &[there]);
    let mut maker = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut ask = maker.stdin.take().unwrap();
    let mut told = BufReader::new(maker.stdout.take().unwrap()).lines();
    let mut hear = |what: &str| {
        let mut lines = told.by_ref().map(|line| line.unwrap());
        lines.find(|line| line.starts_with(what)).unwrap()
    };

    let handle = unhex(hear("made ").split(' ').nth(1).unwrap());
    let driver = driver(here);
    let opened = IpcMapping::open(&driver, DEVICE, &handle).unwrap();
    writeln!(ask).unwrap();
    hear("freed");
    answer(&driver, opened.ptr());
    writeln!(ask).unwrap();
    assert!(maker.wait().unwrap().success());
    assert_eq!(
        &read::<6>(&driver, opened.ptr().offset(GRANULE - 6)),
        b"answer"
    );
    opened.close().unwrap();
}

#[test]
fn memory_of_a_maker_that_is_gone_is_refused() {
    if let Some(task) = task() {
        return Maker::work(&task);
    }
    let mut maker = Maker::start("memory_of_a_maker_that_is_gone_is_refused");
    let driver = driver("sim1");
    let import = || driver.mem_import(DEVICE, &ShareableHandle::Fabric(maker.fabric));
    driver.mem_release(DEVICE, import().unwrap()).unwrap();

    // Another file under the same number is not taken for it: the handle names the file too.
    let mut forged = maker.fabric;
    let inode = 8 + 3 * 8;
    forged[inode] ^= 1;
    let refused = driver
        .mem_import(DEVICE, &ShareableHandle::Fabric(forged))
        .unwrap_err();
    assert_eq!(refused.status(), Some(Status::INVALID_HANDLE));

    maker.kill();
    let refused = driver
        .mem_import(DEVICE, &ShareableHandle::Fabric(maker.fabric))
        .unwrap_err();
    assert_eq!(refused.status(), Some(Status::INVALID_HANDLE));
    let refused = driver.ipc_open(DEVICE, &maker.ipc).unwrap_err();
    assert_eq!(refused.status(), Some(Status::INVALID_VALUE));
}
