//! The second tier of the cache: what pages hold when they are needed for something else goes to a file, and comes back
//! when a sequence begins with it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use lightering_tier::ScratchFile;
use lightering_units::Bytes;

use super::pages::Content;
use crate::tokenizer::Map;
use crate::{Error, PageKind, Result, TokenModel};

/// Where the bytes of pages go.
pub trait SpillStore: Send {
    /// How many pages it can hold.
    fn slots(&self) -> u32;

    /// Writes what `fill` puts into the bytes of a slot.
    ///
    /// # Errors
    /// Why it cannot; the slot holds nothing of use then.
    fn write(&mut self, slot: u32, fill: &mut dyn FnMut(&mut [u8])) -> io::Result<()>;

    /// Lends the bytes of a slot that was written.
    ///
    /// # Errors
    /// Why it cannot.
    fn read(&mut self, slot: u32, take: &mut dyn FnMut(&[u8])) -> io::Result<()>;
}

/// A store in a file without a name, written past the page cache.
#[derive(Debug)]
pub struct SpillFile {
    file: ScratchFile,
    slots: u32,
}

impl SpillFile {
    /// A file in `folder` of at most `size` for pages of `page_bytes` each. It holds [`memory_for`](Self::memory_for)
    /// such a page, which whoever keeps a budget has to count.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the folder cannot be written or not even one page fits.
    pub fn create(folder: &Path, size: Bytes, page_bytes: usize) -> Result<SpillFile> {
        let place = "the file for pages of the cache";
        let memory = SpillFile::memory_for(page_bytes);
        let slots = u32::try_from(size.0 / memory.0).unwrap_or(u32::MAX);
        if slots == 0 {
            return Err(Error::invalid(place, size, format!("at least the {memory} of one page")));
        }
        let file = ScratchFile::create(folder, page_bytes)
            .map_err(|e| Error::invalid(place, e, "a folder that can be written"))?;
        Ok(SpillFile { file, slots })
    }

    /// Memory in which a page of `page_bytes` is gathered on its way.
    #[must_use]
    pub fn memory_for(page_bytes: usize) -> Bytes {
        ScratchFile::memory_for(page_bytes)
    }
}

impl SpillStore for SpillFile {
    fn slots(&self) -> u32 {
        self.slots
    }

    fn write(&mut self, slot: u32, fill: &mut dyn FnMut(&mut [u8])) -> io::Result<()> {
        self.file.write(slot, fill)
    }

    fn read(&mut self, slot: u32, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        self.file.read(slot, take)
    }
}

/// A store of pages, and who is told when it fails.
#[derive(Clone)]
pub struct SpillWarning(Arc<dyn Fn(&str) + Send + Sync>);

impl SpillWarning {
    /// Calls `tell` with each warning.
    pub fn new(tell: impl Fn(&str) + Send + Sync + 'static) -> SpillWarning {
        SpillWarning(Arc::new(tell))
    }
}

impl fmt::Debug for SpillWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SpillWarning")
    }
}

/// What a slot holds.
#[derive(Debug)]
struct Kept {
    kind: PageKind,
    content: Content,
    number: u64,
    used: u64,
}

/// The index of the store: which slot holds what.
pub(super) struct Spill {
    store: Box<dyn SpillStore>,
    warning: SpillWarning,
    slots: Vec<Option<Kept>>,
    by_content: [Map<Content, u32>; 2],
    by_use: BTreeMap<u64, u32>,
    free: Vec<u32>,
    clock: u64,
    /// Writing failed; nothing more is written.
    is_full: bool,
    pub pages_out: u64,
    pub pages_in: u64,
}

impl fmt::Debug for Spill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spill").field("kept", &self.by_use.len()).finish_non_exhaustive()
    }
}

impl Spill {
    pub fn new(store: Box<dyn SpillStore>, warning: SpillWarning) -> Spill {
        Spill {
            store,
            warning,
            slots: Vec::new(),
            by_content: Default::default(),
            by_use: BTreeMap::new(),
            free: Vec::new(),
            clock: 0,
            is_full: false,
            pages_out: 0,
            pages_in: 0,
        }
    }

    /// The slot that holds this, and the number of the content.
    pub fn find(&self, kind: PageKind, content: &Content) -> Option<(u32, u64)> {
        let slot = *self.by_content[kind as usize].get(content)?;
        let kept = self.slots[slot as usize].as_ref().expect("a listed slot holds something");
        Some((slot, kept.number))
    }

    /// Marks a slot as used now, so that others are overwritten first.
    pub fn touch(&mut self, slot: u32) {
        if let Some(kept) = &mut self.slots[slot as usize] {
            self.clock += 1;
            self.by_use.remove(&kept.used);
            kept.used = self.clock;
            self.by_use.insert(self.clock, slot);
        }
    }

    fn empty(&mut self, slot: u32) {
        if let Some(kept) = self.slots[slot as usize].take() {
            self.by_use.remove(&kept.used);
            self.by_content[kept.kind as usize].remove(&kept.content);
            self.free.push(slot);
        }
    }

    /// Writes what a page holds, unless it is there already.
    pub fn put(&mut self, model: &dyn TokenModel, kind: PageKind, page: u32, number: u64, content: Content) {
        if let Some((slot, _)) = self.find(kind, &content) {
            self.touch(slot);
            return;
        }
        if self.is_full {
            return;
        }
        if self.free.is_empty() {
            if self.slots.len() < self.store.slots() as usize {
                self.free.push(self.slots.len() as u32);
                self.slots.push(None);
            } else if let Some((_, slot)) = self.by_use.pop_first() {
                self.empty(slot);
            }
        }
        let Some(slot) = self.free.pop() else { return };
        let size = model.page_bytes(kind);
        let mut copied = Ok(());
        let written = self.store.write(slot, &mut |bytes| {
            copied = match bytes.get_mut(..size) {
                Some(bytes) => model.read_page(kind, page, bytes),
                None => Err(Error::Internal(format!("a slot of less than {size} bytes"))),
            };
        });
        if let Err(problem) = written.map_err(|e| e.to_string()).and(copied.map_err(|e| e.to_string())) {
            self.free.push(slot);
            self.is_full = true;
            (self.warning.0)(&format!(
                "pages of the cache can no longer be written ({problem}); from now on they are computed again instead"
            ));
            return;
        }
        self.clock += 1;
        self.by_content[kind as usize].insert(content.clone(), slot);
        self.by_use.insert(self.clock, slot);
        self.slots[slot as usize] = Some(Kept { kind, content, number, used: self.clock });
        self.pages_out += 1;
    }

    /// Brings back into `page` what a slot holds, if that is still the content with this number, and tells what it is.
    pub fn get(
        &mut self,
        model: &mut dyn TokenModel,
        kind: PageKind,
        slot: u32,
        number: u64,
        page: u32,
    ) -> Option<Content> {
        let kept = self.slots[slot as usize].as_ref().filter(|k| k.kind == kind && k.number == number)?;
        let content = kept.content.clone();
        let size = model.page_bytes(kind);
        let mut copied = Ok(());
        let read = self.store.read(slot, &mut |bytes| {
            copied = match bytes.get(..size) {
                Some(bytes) => model.write_page(kind, page, bytes),
                None => Err(Error::Internal(format!("a slot of less than {size} bytes"))),
            };
        });
        match read.map_err(|e| e.to_string()).and(copied.map_err(|e| e.to_string())) {
            Ok(()) => {
                self.pages_in += 1;
                Some(content)
            }
            Err(problem) => {
                self.empty(slot);
                (self.warning.0)(&format!(
                    "a page of the cache cannot be read back ({problem}); it is computed again instead"
                ));
                None
            }
        }
    }
}
