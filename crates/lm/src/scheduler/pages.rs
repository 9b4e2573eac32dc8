//! The cache pages: who holds which, and which of those that nobody holds are still worth something.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::spill::Spill;
use crate::tokenizer::Map;
use crate::{PageKind, TokenModel, WindowCache};

/// What a full page holds: the tokens in it, behind the tokens of the pages before it.
///
/// The pages before are told by a number that is never used twice, so that equality is exact without comparing more than
/// one page.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Content {
    /// The number of the page before, or [`ROOT`].
    before: u64,
    tokens: Arc<[u32]>,
}

/// The number of what comes before the first page.
pub(super) const ROOT: u64 = 0;

/// In the place of a page that was let go since nobody sees its positions any more.
pub(super) const NO_PAGE: u32 = u32::MAX;

/// The pages of a model: of layers that see everything, and of layers with a window where those have their own.
#[derive(Debug)]
pub(super) struct Pools {
    pub all: PagePool,
    pub windows: Option<Windows>,
    pub spill: Option<Spill>,
}

/// Where a content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere, since no later token sees it.
    Gone,
    Page(u32),
    /// In a slot of the spill, with its number there.
    Slot(u32, u64),
}

/// Pages of layers with a window. What they hold is told by the number of the page of the other layers with the same
/// positions.
#[derive(Debug)]
pub(super) struct Windows {
    pub cache: WindowCache,
    pub pool: PagePool,
}

/// What is in the cache of the beginning of a sequence: whole pages with their numbers, and pages of windows where
/// those have their own.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub pages: Vec<(Place, u64)>,
    pub window_pages: Vec<Place>,
}

impl Pools {
    pub fn new(page_len: usize, page_count: usize, window: Option<WindowCache>) -> Pools {
        let windows = |cache: WindowCache| Windows { cache, pool: PagePool::new(page_len, cache.pages) };
        Pools { all: PagePool::new(page_len, page_count), windows: window.map(windows), spill: None }
    }

    /// Keeps in `spill` what pages hold when they are needed for something else.
    pub fn set_spill(&mut self, spill: Spill) {
        self.spill = Some(spill);
        self.all.notes_evicted = true;
        if let Some(windows) = &mut self.windows {
            windows.pool.notes_evicted = true;
        }
    }

    /// Writes what pages hold that were given away since the last call; before anything is computed into them.
    pub fn flush(&mut self, model: &dyn TokenModel) {
        let Some(spill) = &mut self.spill else { return };
        let windows = self.windows.as_mut().map(|w| (&mut w.pool, PageKind::Window));
        for (pool, kind) in std::iter::once((&mut self.all, PageKind::Shared)).chain(windows) {
            for (page, number, content) in pool.evicted.drain(..) {
                spill.put(model, kind, page, number, content);
            }
        }
    }

    fn pool(&mut self, kind: PageKind) -> Option<&mut PagePool> {
        match kind {
            PageKind::Shared => Some(&mut self.all),
            PageKind::Window => self.windows.as_mut().map(|w| &mut w.pool),
        }
    }

    /// Brings what a slot holds back into a page for the caller.
    pub fn restore(
        &mut self,
        model: &mut dyn TokenModel,
        kind: PageKind,
        slot: u32,
        number: u64,
    ) -> Option<u32> {
        let page = self.pool(kind)?.allocate()?;
        self.flush(model);
        let content = self.spill.as_mut().and_then(|spill| spill.get(model, kind, slot, number, page));
        let pool = self.pool(kind)?;
        match content {
            Some(content) => {
                pool.put_back(page, number, content);
                Some(page)
            }
            None => {
                pool.release(&mut vec![page]);
                None
            }
        }
    }

    pub fn hold(&mut self, kind: PageKind, page: u32) {
        if let Some(pool) = self.pool(kind) {
            pool.hold(page);
        }
    }

    pub fn touch(&mut self, slot: u32) {
        if let Some(spill) = &mut self.spill {
            spill.touch(slot);
        }
    }

    /// Tells what a full page of the caller's holds ([`PagePool::register`]).
    pub fn register(&mut self, kind: PageKind, page: &mut u32, before: u64, tokens: &[u32]) -> u64 {
        let spill = self.spill.as_ref().map(|spill| (spill, kind));
        match (kind, &mut self.windows) {
            (PageKind::Window, Some(windows)) => windows.pool.register(page, before, tokens, spill),
            _ => self.all.register(page, before, tokens, spill),
        }
    }

    fn place(&self, kind: PageKind, before: u64, tokens: &[u32]) -> Option<(Place, u64)> {
        let pool = match kind {
            PageKind::Shared => &self.all,
            PageKind::Window => &self.windows.as_ref()?.pool,
        };
        if let Some((page, number)) = pool.find(before, tokens) {
            return Some((Place::Page(page), number));
        }
        let (slot, number) = self.spill.as_ref()?.find(kind, &Content { before, tokens: tokens.into() })?;
        Some((Place::Slot(slot, number), number))
    }

    pub fn page_len(&self) -> usize {
        self.all.page_len()
    }

    /// The index of the first page of windows that a row at `position` or behind it sees.
    pub fn first_window_page(&self, position: usize) -> usize {
        self.windows.as_ref().map_or(0, |w| w.cache.first_seen(position) / w.pool.page_len())
    }

    /// The full pages of a beginning that are in the cache.
    pub fn find_prefix(&self, tokens: &[u32]) -> Found {
        let mut found = Found::default();
        let mut before = ROOT;
        for tokens in tokens.chunks_exact(self.page_len()) {
            let Some((place, number)) = self.place(PageKind::Shared, before, tokens) else { break };
            found.pages.push((place, number));
            before = number;
        }
        if self.windows.is_none() {
            return found;
        }
        let window = |number: u64| Some(self.place(PageKind::Window, number, &[])?.0);
        let there: Vec<Option<Place>> = found.pages.iter().map(|(_, number)| window(*number)).collect();
        // The longest beginning behind which the window is there as a whole.
        let mut count = found.pages.len();
        loop {
            let first = self.first_window_page(count * self.page_len()).min(count);
            match there[first..count].iter().rposition(Option::is_none) {
                // What needs this page is at least so much too long.
                Some(missing) => count = first + missing,
                None => {
                    let pages = there[first..count].iter().flatten();
                    found.window_pages =
                        std::iter::repeat_n(Place::Gone, first).chain(pages.copied()).collect();
                    break;
                }
            }
        }
        found.pages.truncate(count);
        found
    }

    /// Whether a sequence of `tokens` tokens that begins with what was found can be taken on, when everybody who runs may
    /// soon need one more page.
    pub fn admits(&self, tokens: usize, found: &Found, running: usize) -> bool {
        let all = (tokens + 1).div_ceil(self.page_len());
        let idle = |pool: &PagePool, place: Place| matches!(place, Place::Page(page) if pool.is_idle(page));
        let there = |place: Place| matches!(place, Place::Page(_));
        let reused = found.pages.iter().filter(|(place, _)| idle(&self.all, *place)).count();
        let held = found.pages.iter().filter(|(place, _)| there(*place)).count();
        if all.saturating_sub(held) + reused + running > self.all.available() {
            return false;
        }
        self.windows.as_ref().is_none_or(|Windows { cache, pool }| {
            let held = found.window_pages.iter().filter(|place| there(**place)).count();
            let reused = found.window_pages.iter().filter(|place| idle(pool, **place)).count();
            let most = all.min(WindowCache::least_pages(cache.len, pool.page_len()));
            most.saturating_sub(held) + reused + running <= pool.available()
        })
    }
}

#[derive(Debug, Default)]
struct Page {
    references: u32,
    /// What it holds and the number that it got for that.
    known: Option<(u64, Content)>,
    /// When it was let go; its place in `idle`.
    idle_since: u64,
}

#[derive(Debug)]
pub(super) struct PagePool {
    page_len: usize,
    pages: Vec<Page>,
    /// Pages that hold nothing of use.
    free: Vec<u32>,
    /// Pages that nobody holds, but whose content is known; the one that was let go first is taken first.
    idle: BTreeMap<u64, u32>,
    known: Map<Content, u32>,
    number: u64,
    clock: u64,
    /// Whether what is known of pages that are needed for something else is noted in `evicted`.
    pub notes_evicted: bool,
    /// Pages that still hold what was known of them until something else is computed into them.
    evicted: Vec<(u32, u64, Content)>,
}

impl PagePool {
    pub fn new(page_len: usize, page_count: usize) -> PagePool {
        let page_count = u32::try_from(page_count).unwrap_or(u32::MAX);
        PagePool {
            page_len,
            pages: (0..page_count).map(|_| Page::default()).collect(),
            free: (0..page_count).rev().collect(),
            idle: BTreeMap::new(),
            known: Map::default(),
            number: ROOT,
            clock: 0,
            notes_evicted: false,
            evicted: Vec::new(),
        }
    }

    pub fn page_len(&self) -> usize {
        self.page_len
    }

    /// Pages that can be had.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages that somebody holds.
    pub fn held(&self) -> usize {
        self.pages.len() - self.available()
    }

    /// Pages that nobody holds, but that may be of use again.
    pub fn cached(&self) -> usize {
        self.idle.len()
    }

    /// A page for the caller alone.
    pub fn allocate(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.idle.pop_first()?;
                if let Some((number, content)) = self.unlist(page)
                    && self.notes_evicted
                {
                    self.evicted.push((page, number, content));
                }
                page
            }
        };
        self.pages[page as usize].references = 1;
        Some(page)
    }

    /// The page that holds `tokens` behind page number `before`, and its number. It is not held yet.
    pub fn find(&self, before: u64, tokens: &[u32]) -> Option<(u32, u64)> {
        let page = *self.known.get(&Content { before, tokens: tokens.into() })?;
        let (number, _) = self.pages[page as usize].known.as_ref().expect("a listed page knows its content");
        Some((page, *number))
    }

    /// Whether nobody holds the page.
    pub fn is_idle(&self, page: u32) -> bool {
        self.pages[page as usize].references == 0
    }

    /// Holds a page once more.
    pub fn hold(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        if entry.references == 0 {
            self.idle.remove(&entry.idle_since);
        }
        entry.references += 1;
    }

    /// Lets pages go, the last first, so that beginnings are kept longest.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        while let Some(page) = pages.pop() {
            if page == NO_PAGE {
                continue;
            }
            let entry = &mut self.pages[page as usize];
            entry.references = entry.references.checked_sub(1).expect("only held pages are let go");
            if entry.references > 0 {
                continue;
            }
            if entry.known.is_some() {
                self.clock += 1;
                entry.idle_since = self.clock;
                self.idle.insert(self.clock, page);
            } else {
                self.free.push(page);
            }
        }
    }

    /// Tells what a full page of the caller's holds. Where another page holds the same already, the caller gets that one
    /// in its place. Gives the number of the content.
    ///
    /// `spill` knows the numbers of contents that are elsewhere.
    pub fn register(
        &mut self,
        page: &mut u32,
        before: u64,
        tokens: &[u32],
        spill: Option<(&Spill, PageKind)>,
    ) -> u64 {
        if let Some((other, number)) = self.find(before, tokens) {
            if other != *page {
                self.hold(other);
                let mut own = vec![std::mem::replace(page, other)];
                self.release(&mut own);
            }
            return number;
        }
        let content = Content { before, tokens: tokens.into() };
        let known = spill.and_then(|(spill, kind)| spill.find(kind, &content));
        let number = known.map_or_else(
            || {
                self.number += 1;
                self.number
            },
            |(_, number)| number,
        );
        self.put_back(*page, number, content);
        number
    }

    /// Forgets what a page holds, since it may no longer hold it.
    pub fn forget(&mut self, page: u32) {
        if page == NO_PAGE {
            return;
        }
        self.unlist(page);
        let entry = &self.pages[page as usize];
        if entry.references == 0 && self.idle.remove(&entry.idle_since).is_some() {
            self.free.push(page);
        }
    }

    fn unlist(&mut self, page: u32) -> Option<(u64, Content)> {
        let known = self.pages[page as usize].known.take()?;
        self.known.remove(&known.1);
        Some(known)
    }

    /// Has a page of the caller's hold a content that was known before.
    fn put_back(&mut self, page: u32, number: u64, content: Content) {
        self.known.insert(content.clone(), page);
        self.pages[page as usize].known = Some((number, content));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_pages_are_found_again_until_they_are_needed() {
        let mut pool = PagePool::new(2, 3);
        let mut first = pool.allocate().unwrap();
        let mut second = pool.allocate().unwrap();
        let one = pool.register(&mut first, ROOT, &[1, 2], None);
        let two = pool.register(&mut second, one, &[3, 4], None);
        assert_ne!(one, two);
        assert_eq!(pool.find(ROOT, &[3, 4]), None, "the same tokens elsewhere are something else");
        pool.release(&mut vec![first, second]);
        assert_eq!((pool.held(), pool.cached(), pool.available()), (0, 2, 3));
        assert_eq!(pool.find(one, &[3, 4]), Some((second, two)));
        // The free page goes first, then the end of the chain.
        assert!(![first, second].contains(&pool.allocate().unwrap()));
        assert_eq!(pool.allocate(), Some(second));
        assert_eq!(pool.find(one, &[3, 4]), None);
        assert_eq!(pool.find(ROOT, &[1, 2]), Some((first, one)));
        pool.hold(first);
        assert_eq!(pool.allocate(), None);
        pool.release(&mut vec![first]);
        pool.forget(first);
        assert_eq!((pool.cached(), pool.available()), (0, 1));
    }

    #[test]
    fn equal_pages_become_one() {
        let mut pool = PagePool::new(1, 4);
        let (mut a, mut b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        let number = pool.register(&mut a, ROOT, &[9], None);
        assert_eq!(pool.register(&mut b, ROOT, &[9], None), number);
        assert_eq!(a, b);
        assert_eq!(pool.held(), 1);
        pool.release(&mut vec![a]);
        assert_eq!(pool.held(), 1);
        pool.release(&mut vec![b]);
        assert_eq!((pool.held(), pool.available()), (0, 4));
    }
}
