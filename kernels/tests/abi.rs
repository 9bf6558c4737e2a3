//! The header as a C compiler sees it, and as the bindings say it is.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ep_kernels::ffi;

fn include_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include")
}

/// Compiles a C source of a test; the command's output, and where the program is.
fn compile(name: &str, source: &str, flags: &[&str]) -> (Output, PathBuf) {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (from, to) = (directory.join(format!("{name}.c")), directory.join(name));
    fs::write(&from, source).unwrap();
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let output = Command::new(compiler)
        .args(flags)
        .args(["-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(include_dir())
        .arg(from)
        .arg("-o")
        .arg(&to)
        .output()
        .expect("a C compiler is needed: install one as `cc`, or name it in CC");
    (output, to)
}

fn assert_compiles((output, program): (Output, PathBuf)) -> PathBuf {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    program
}

#[test]
fn header_is_plain_c99() {
    // Twice, for the guard; first, so that it brings what it needs.
    let twice =
        "#include \"ep_kernels.h\"\n#include \"ep_kernels.h\"\nint main(void) { return 0; }\n";
    assert_compiles(compile("header_c99", twice, &["-std=c99"]));
    assert_compiles(compile("header_c11", twice, &["-std=c11"]));
}

/// One line per fact: what it is called, and a number.
type Facts = Vec<(String, i128)>;

/// Facts of structs with all their fields, from Rust, and the C that prints them.
macro_rules! structs {
    ($($name:ident { $($field:ident),* $(,)? })*) => {
        fn struct_facts() -> (Facts, String) {
            let (mut facts, mut c) = (Facts::new(), String::new());
            $({
                // Every field is named: one that is missing here does not compile.
                let ffi::$name { $($field: _),* } = ffi::$name::default();
                let name = stringify!($name);
                facts.push((format!("sizeof {name}"), size_of::<ffi::$name>() as i128));
                writeln!(c, "  fact(\"sizeof {name}\", (long long)sizeof({name}));").unwrap();
                $(
                    let field = stringify!($field);
                    let offset = std::mem::offset_of!(ffi::$name, $field);
                    facts.push((format!("{name}.{field}"), offset as i128));
                    writeln!(
                        c,
                        "  fact(\"{name}.{field}\", (long long)offsetof({name}, {field}));"
                    )
                    .unwrap();
                )*
            })*
            (facts, c)
        }
    };
}

structs! {
    ep_fault { sequence, epoch, fault, op, phase, peer, token, value }
    ep_layout {
        counts, counts_source_stride, counts_ring_stride, rows, row_stride, rows_source_stride,
        rows_ring_stride, weights, weight_stride, weights_source_stride, weights_slot_stride,
        partials, partial_stride, partials_source_stride, partials_slot_stride, barrier, bytes,
        ring, slots, header_lines, weight_lines,
    }
    ep_group {
        peer_table, control, faults, timeout_ns, rank, num_ranks, num_experts, max_tokens, hidden,
        max_top_k, device, num_sms,
    }
    ep_handle { route, recv_map, recv_rows, slot, num_tokens, top_k, reserved }
    ep_dispatch_args {
        struct_size, flags, group, layout, handle, x, topk_idx, topk_weights, recv_x, recv_scales,
        recv_count, src_info, layout_range, total_count, wait_ns,
    }
    ep_combine_args { struct_size, flags, group, layout, handle, y, topk_weights, out }
    ep_barrier_args { struct_size, reserved, group, layout, spin_ns }
    ep_empty_args { struct_size, device }
    ep_dequantize_args { struct_size, device, x, scales, scale_stride, out, rows, hidden }
    ep_swiglu_args { struct_size, device, gate_up, out, rows, intermediate }
}

/// Facts of constants.
macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        const CONSTANTS: &[(&str, i128)] = &[$((stringify!($name), ffi::$name as i128)),*];
    };
}

constants! {
    EP_KERNELS_ABI_VERSION, EP_MAX_LOCAL_EXPERTS, EP_MAX_EXPERTS, EP_MAX_TOP_K, EP_MAX_HIDDEN,
    EP_MAX_TOKENS,
    EP_MAX_RANKS, EP_HIDDEN_MULTIPLE, EP_LINE_BYTES, EP_LINE_DATA_BYTES, EP_DISPATCH_FP8,
    EP_DISPATCH_WEIGHTS, EP_DISPATCH_SEND, EP_DISPATCH_RECV, EP_DISPATCH_POW2, EP_DISPATCH_UE8M0,
    EP_COMBINE_WEIGHTS, EP_COMBINE_SEND, EP_COMBINE_RECV, EP_LAUNCH_OK, EP_LAUNCH_CUDA_ERROR,
    EP_LAUNCH_BAD_ARGS, EP_LAUNCH_UNSUPPORTED, EP_LAUNCH_TOO_LARGE, EP_FAULT_NONE, EP_FAULT_TIMEOUT,
    EP_FAULT_EXPERT_RANGE, EP_FAULT_EXPERT_REPEATED, EP_FAULT_UNREACHABLE, EP_FAULT_ABORTED,
    EP_OP_DISPATCH, EP_OP_COMBINE, EP_OP_BARRIER, EP_PHASE_SEND, EP_PHASE_COUNTS, EP_PHASE_ROWS,
    EP_PHASE_WEIGHTS, EP_PHASE_PARTIALS, EP_PHASE_BARRIER, EP_FAULT_BYTES, EP_FAULT_RING,
    EP_ROWS_GIVEN_UP, EP_CONTROL_FIXED_BYTES, EP_CONTROL_WAITS, EP_ABORTED,
}

#[test]
fn bindings_are_the_header() {
    let (mut facts, mut prints) = struct_facts();
    for &(name, value) in CONSTANTS {
        facts.push((name.into(), value));
        writeln!(prints, "  fact(\"{name}\", (long long)({name}));").unwrap();
    }
    let shape = ep_kernels::Shape {
        num_ranks: 24,
        num_experts: 24,
        max_tokens: 1,
        hidden: 128,
        max_top_k: 1,
        slots: 1,
        sends_in_flight: 1,
    };
    facts.push(("control bytes".into(), shape.control_bytes().into()));
    prints.push_str("  fact(\"control bytes\", (long long)EP_CONTROL_BYTES(24u));\n");
    for (i, at) in shape.control_waits().into_iter().enumerate() {
        facts.push((format!("control wait {i}"), at.into()));
        writeln!(
            prints,
            "  fact(\"control wait {i}\", (long long)EP_CONTROL_WAIT(24u, {i}u));"
        )
        .unwrap();
    }

    let source = format!(
        "#include \"ep_kernels.h\"\n#include <stddef.h>\n#include <stdio.h>\n\
         static void fact(const char *name, long long value) {{ printf(\"%s\\t%lld\\n\", name, value); }}\n\
         int main(void) {{\n{prints}  return 0;\n}}\n"
    );
    let program = assert_compiles(compile("abi_facts", &source, &["-std=c99"]));
    let output = Command::new(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let from_c: Facts = text
        .lines()
        .map(|line| line.split_once('\t').unwrap())
        .map(|(name, value)| (name.into(), value.parse().unwrap()))
        .collect();
    assert_eq!(from_c, facts);
}

#[test]
fn every_constant_of_the_header_is_compared() {
    let header = fs::read_to_string(include_dir().join("ep_kernels.h")).unwrap();
    let defined = header
        .lines()
        .filter_map(|line| line.strip_prefix("#define "))
        .filter_map(|line| line.split_once(' '))
        // Not the macros that take arguments.
        .filter(|(name, _)| !name.contains('('))
        .map(|(name, _)| name);
    for name in defined {
        assert!(CONSTANTS.iter().any(|&(known, _)| known == name), "{name}");
    }
}
