//! The cluster file. Walked by hand over the parsed document: every error has its line, and the keys
//! accepted here are exactly the keys of the format.

use std::borrow::Cow;

use ep_sys::{Bytes16, FabricState, Status};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Cluster, Gpu, IpcNamespace, Node, PeerAccess};

/// More GPUs than any host has; bounds what a file of a few bytes can ask for.
const MAX_GPUS_PER_NODE: u32 = 1024;

/// Why a cluster file was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// The file is not TOML.
    #[error("line {line}: {message}; check the TOML syntax")]
    Syntax {
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A key that the format does not have.
    #[error(
        "line {line}: unknown key `{}`; the keys here are {expected}",
        key.escape_debug()
    )]
    UnknownKey {
        /// Line, from 1.
        line: usize,
        /// The key, without the quotes and escapes of the file.
        key: String,
        /// The keys that could stand there.
        expected: &'static str,
    },
    /// A table lacks a key that has no default.
    #[error("line {line}: the node has no `{key}`; add it")]
    MissingKey {
        /// Line of the table, from 1.
        line: usize,
        /// The key.
        key: &'static str,
    },
    /// A value of the wrong type, or none of the accepted ones.
    #[error("line {line}: `{key}` must be {expected}")]
    BadValue {
        /// Line, from 1.
        line: usize,
        /// The key.
        key: &'static str,
        /// What is accepted.
        expected: &'static str,
    },
    /// The file describes no node.
    #[error("the cluster has no nodes; add a [[node]] table")]
    NoNodes,
}

pub(super) fn parse(text: &str) -> Result<Cluster, ClusterError> {
    let document = DeTable::parse(text).map_err(|error| ClusterError::Syntax {
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    let root = Section {
        text,
        line: 1,
        table: document.get_ref(),
    };
    root.check_keys(&["node"], "`node`")?;
    let mut nodes = Vec::new();
    if let Some(value) = root.find("node") {
        let tables = "an array of tables, [[node]]";
        let Some(list) = value.get_ref().as_array() else {
            return Err(root.bad("node", value, tables));
        };
        for value in list {
            let section = root
                .section(value)
                .ok_or_else(|| root.bad("node", value, tables))?;
            nodes.push(node(&section)?);
        }
    }
    if nodes.is_empty() {
        return Err(ClusterError::NoNodes);
    }
    Ok(Cluster { nodes, run_key: 0 })
}

fn node(section: &Section<'_>) -> Result<Node, ClusterError> {
    section.check_keys(
        &[
            "name",
            "imex_channel",
            "nics",
            "ipc_namespace",
            "gpus",
            "gpu",
        ],
        "`name`, `imex_channel`, `nics`, `ipc_namespace`, `gpus` and [node.gpu]",
    )?;
    let gpu = match section.find("gpu") {
        None => Gpu::default(),
        Some(value) => gpu(&section
            .section(value)
            .ok_or_else(|| section.bad("gpu", value, "a table, [node.gpu]"))?)?,
    };
    let name = section.required("name", "a text that is not empty", |value| {
        value
            .as_str()
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
    })?;
    let gpus = section.required("gpus", "a number from 1 to 1024", |value| {
        integer(value).filter(|gpus| (1..=MAX_GPUS_PER_NODE).contains(gpus))
    })?;
    Ok(Node {
        imex_channel: section.boolean("imex_channel", false)?,
        nics: section.integer("nics", 0)?,
        ipc_namespace: section.one_of(
            "ipc_namespace",
            "\"shared\" or \"private\"",
            &[
                ("shared", IpcNamespace::Shared),
                ("private", IpcNamespace::Private),
            ],
            IpcNamespace::Shared,
        )?,
        ..Node::new(name, gpu, gpus)
    })
}

fn gpu(section: &Section<'_>) -> Result<Gpu, ClusterError> {
    section.check_keys(
        &[
            "fabric_attribute",
            "posix_fd_attribute",
            "fabric_state",
            "fabric_status",
            "cluster_uuid",
            "clique_id",
            "create_fabric",
            "import_fabric",
            "peer_access",
        ],
        "`fabric_attribute`, `posix_fd_attribute`, `fabric_state`, `fabric_status`, \
         `cluster_uuid`, `clique_id`, `create_fabric`, `import_fabric` and `peer_access`",
    )?;
    let default = Gpu::default();
    Ok(Gpu {
        product: default.product,
        gdr_attribute: default.gdr_attribute,
        fabric_attribute: section.boolean("fabric_attribute", default.fabric_attribute)?,
        posix_fd_attribute: section.boolean("posix_fd_attribute", default.posix_fd_attribute)?,
        fabric_state: section.one_of(
            "fabric_state",
            "\"not-supported\", \"not-started\", \"in-progress\" or \"completed\"",
            &[
                ("not-supported", FabricState::NotSupported),
                ("not-started", FabricState::NotStarted),
                ("in-progress", FabricState::InProgress),
                ("completed", FabricState::Completed),
            ],
            default.fabric_state,
        )?,
        fabric_status: section.integer("fabric_status", default.fabric_status)?,
        cluster_uuid: section
            .optional("cluster_uuid", "a UUID of 32 hexadecimal digits", |value| {
                value.as_str().and_then(uuid)
            })?
            .unwrap_or(default.cluster_uuid),
        clique_id: section.integer("clique_id", default.clique_id)?,
        create_fabric: Status(section.integer("create_fabric", default.create_fabric.0)?),
        import_fabric: Status(section.integer("import_fabric", default.import_fabric.0)?),
        peer_access: section.one_of(
            "peer_access",
            "\"all\", \"pcie\" or \"none\"",
            &[
                ("all", PeerAccess::All),
                ("pcie", PeerAccess::Pcie),
                ("none", PeerAccess::None),
            ],
            default.peer_access,
        )?,
    })
}

/// A table of the document, and where it starts.
struct Section<'a> {
    text: &'a str,
    line: usize,
    table: &'a DeTable<'a>,
}

impl<'a> Section<'a> {
    /// Refuses the first key, in file order, that is not `known`.
    fn check_keys(&self, known: &[&str], expected: &'static str) -> Result<(), ClusterError> {
        let unknown = |key: &&Spanned<Cow<'_, str>>| !known.contains(&key.get_ref().as_ref());
        match self
            .table
            .keys()
            .filter(unknown)
            .min_by_key(|key| key.span().start)
        {
            None => Ok(()),
            Some(key) => Err(ClusterError::UnknownKey {
                line: line_of(self.text, key.span().start),
                key: key.get_ref().clone().into_owned(),
                expected,
            }),
        }
    }

    fn find(&self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.table
            .iter()
            .find(|(name, _)| name.get_ref() == key)
            .map(|(_, value)| value)
    }

    fn section(&self, value: &'a Spanned<DeValue<'a>>) -> Option<Section<'a>> {
        let line = line_of(self.text, value.span().start);
        value.get_ref().as_table().map(|table| Section {
            text: self.text,
            line,
            table,
        })
    }

    fn optional<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        read: impl FnOnce(&DeValue<'_>) -> Option<T>,
    ) -> Result<Option<T>, ClusterError> {
        let Some(value) = self.find(key) else {
            return Ok(None);
        };
        read(value.get_ref())
            .map(Some)
            .ok_or_else(|| self.bad(key, value, expected))
    }

    fn required<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        read: impl FnOnce(&DeValue<'_>) -> Option<T>,
    ) -> Result<T, ClusterError> {
        self.optional(key, expected, read)?
            .ok_or(ClusterError::MissingKey {
                line: self.line,
                key,
            })
    }

    fn boolean(&self, key: &'static str, default: bool) -> Result<bool, ClusterError> {
        Ok(self
            .optional(key, "true or false", |value| value.as_bool())?
            .unwrap_or(default))
    }

    fn integer(&self, key: &'static str, default: u32) -> Result<u32, ClusterError> {
        Ok(self
            .optional(key, "a number from 0 to 4294967295", integer)?
            .unwrap_or(default))
    }

    fn one_of<T: Copy>(
        &self,
        key: &'static str,
        expected: &'static str,
        values: &[(&str, T)],
        default: T,
    ) -> Result<T, ClusterError> {
        let read = |value: &DeValue<'_>| {
            let text = value.as_str()?;
            values
                .iter()
                .find(|(name, _)| *name == text)
                .map(|(_, value)| *value)
        };
        Ok(self.optional(key, expected, read)?.unwrap_or(default))
    }

    fn bad(
        &self,
        key: &'static str,
        value: &Spanned<DeValue<'_>>,
        expected: &'static str,
    ) -> ClusterError {
        ClusterError::BadValue {
            line: line_of(self.text, value.span().start),
            key,
            expected,
        }
    }
}

fn integer(value: &DeValue<'_>) -> Option<u32> {
    let integer = value.as_integer()?;
    u32::from_str_radix(integer.as_str(), integer.radix()).ok()
}

/// A UUID in its usual spelling, or without hyphens.
fn uuid(text: &str) -> Option<Bytes16> {
    let hyphens = text
        .bytes()
        .enumerate()
        .filter(|(_, b)| *b == b'-')
        .map(|(at, _)| at);
    let hyphens: Vec<_> = hyphens.collect();
    if !(hyphens.is_empty() || hyphens == [8, 13, 18, 23]) {
        return None;
    }
    let digits: Vec<_> = text
        .chars()
        .filter(|c| *c != '-')
        .map(|c| c.to_digit(16))
        .collect();
    let digits: Vec<_> = digits.into_iter().collect::<Option<_>>()?;
    if digits.len() != 32 {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::try_from(pair[0] << 4 | pair[1]).ok()?;
    }
    Some(Bytes16(bytes))
}

/// The line, from 1, of a byte offset.
fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}
