//! PTX, and the header's promises.

use super::lexer::{Keep, blank, parentheses, words};
use super::{File, Problem};

const HEADER: &str = "kernels/include/ep_kernels.h";
const SOURCES: &str = "kernels/cuda/";
const PTX: &str = "kernels/cuda/arch/";

/// PTX stands in one folder, and the compiler may neither drop a statement nor move other memory
/// accesses over it.
pub(super) fn check(file: &File) -> Vec<Problem> {
    if !file.path.starts_with(SOURCES) {
        return Vec::new();
    }
    let code = blank(&file.text, Keep::Code);
    let strings = blank(&file.text, Keep::Strings);
    let mut problems = Vec::new();
    for (offset, word) in words(&code) {
        if !matches!(word, "asm" | "__asm__" | "__asm") {
            continue;
        }
        let mut report = |rule: &str| problems.push(Problem::at(file, offset, rule));
        if !file.path.starts_with(PTX) {
            report("PTX belongs in kernels/cuda/arch");
        }
        let rest = code[offset + word.len()..].trim_start();
        let rest = match rest.strip_prefix("volatile") {
            Some(rest) => rest.trim_start(),
            None => {
                report("asm without volatile");
                rest
            }
        };
        let start = code.len() - rest.len();
        let statement = parentheses(rest).map(|length| &strings[start..start + length]);
        if !statement.is_some_and(|statement| statement.contains("\"memory\"")) {
            report("asm without a \"memory\" clobber");
        }
    }
    if file.text.contains("multimem.") || file.text.contains("cuMulticastCreate") {
        problems.push(Problem::of(&file.path, "NVLink multicast stays unused"));
    }
    problems
}

/// Every function that the header declares is defined in a CUDA source.
pub(super) fn check_launchers(files: &[File]) -> Vec<Problem> {
    let Some(header) = files.iter().find(|file| file.path == HEADER) else {
        return vec![Problem::of(HEADER, "is missing")];
    };
    let is_source = |file: &&File| file.path.starts_with(SOURCES) && file.path.ends_with(".cu");
    let defined: Vec<String> = files
        .iter()
        .filter(is_source)
        .flat_map(|file| functions(&blank(&file.text, Keep::Code), '{'))
        .map(|(_, name)| name)
        .collect();
    functions(&blank(&header.text, Keep::Code), ';')
        .into_iter()
        .filter(|(_, name)| !defined.contains(name))
        .map(|(offset, name)| Problem::at(header, offset, format!("{name} is defined in no .cu")))
        .collect()
}

/// Functions named `ep_*` whose parameters are followed by `then`.
fn functions(code: &str, then: char) -> Vec<(usize, String)> {
    words(code)
        .filter(|(_, word)| word.starts_with("ep_"))
        .filter(|(offset, word)| {
            let rest = code[offset + word.len()..].trim_start();
            parentheses(rest).is_some_and(|length| {
                let rest = rest[length..].trim_start();
                rest.strip_prefix("noexcept")
                    .unwrap_or(rest)
                    .trim_start()
                    .starts_with(then)
            })
        })
        .map(|(offset, word)| (offset, word.into()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    fn rules(path: &str, text: &str) -> Vec<String> {
        check(&file(path, text))
            .into_iter()
            .map(|problem| problem.to_string())
            .collect()
    }

    #[test]
    fn ptx_stands_in_its_folder_with_a_clobber() {
        let text = "asm volatile(\"ld.x %0, [%1];\" : \"=r\"(v) : \"l\"(p) : \"memory\");\n";
        assert_eq!(rules("kernels/cuda/arch/memory.cuh", text), [""; 0]);
        assert_eq!(
            rules("kernels/cuda/dispatch.cu", text),
            ["kernels/cuda/dispatch.cu:1: PTX belongs in kernels/cuda/arch"]
        );
        let text = "\nasm(\"membar;\"); // asm volatile(\"x\" ::: \"memory\")\n";
        assert_eq!(
            rules("kernels/cuda/arch/memory.cuh", text),
            [
                "kernels/cuda/arch/memory.cuh:2: asm without volatile",
                "kernels/cuda/arch/memory.cuh:2: asm without a \"memory\" clobber",
            ]
        );
        let text = "asm volatile(\"x\"); f(\"memory\");\n";
        assert_eq!(rules("kernels/cuda/arch/memory.cuh", text).len(), 1);
    }

    #[test]
    fn declared_launchers_are_defined() {
        let header = "int32_t ep_a_launch(const ep_a *args, void *stream);\n\
                      int32_t ep_b_launch(void); /* int32_t ep_c_launch(void); */\n";
        let source = "extern \"C\" int32_t ep_a_launch(const ep_a* args, void* stream) { return 0; }\n\
                      int32_t ep_b_launch(void);\nvoid g() { ep_b_launch(); }\n";
        let files = [file(HEADER, header), file("kernels/cuda/a.cu", source)];
        let problems: Vec<_> = check_launchers(&files)
            .iter()
            .map(Problem::to_string)
            .collect();
        assert_eq!(
            problems,
            ["kernels/include/ep_kernels.h:2: ep_b_launch is defined in no .cu"]
        );
    }
}
