//! The cache pages: who holds which, and which of those that nobody holds are still worth something.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::WindowCache;
use crate::tokenizer::Map;

/// What a full page holds: the tokens in it, behind the tokens of the pages before it.
///
/// The pages before are told by a number that is never used twice, so that equality is exact without comparing more than
/// one page.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Content {
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
    pub pages: Vec<(u32, u64)>,
    pub window_pages: Vec<u32>,
}

impl Pools {
    pub fn new(page_len: usize, page_count: usize, window: Option<WindowCache>) -> Pools {
        let windows = |cache: WindowCache| Windows { cache, pool: PagePool::new(page_len, cache.pages) };
        Pools { all: PagePool::new(page_len, page_count), windows: window.map(windows) }
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
            let Some((page, number)) = self.all.find(before, tokens) else { break };
            found.pages.push((page, number));
            before = number;
        }
        let Some(windows) = &self.windows else { return found };
        let there: Vec<Option<u32>> =
            found.pages.iter().map(|(_, number)| Some(windows.pool.find(*number, &[])?.0)).collect();
        // The longest beginning behind which the window is there as a whole.
        let mut count = found.pages.len();
        loop {
            let first = self.first_window_page(count * self.page_len()).min(count);
            match there[first..count].iter().rposition(Option::is_none) {
                // What needs this page is at least so much too long.
                Some(missing) => count = first + missing,
                None => {
                    let pages = there[first..count].iter().flatten();
                    found.window_pages = std::iter::repeat_n(NO_PAGE, first).chain(pages.copied()).collect();
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
        let idle = |pool: &PagePool, page: u32| page != NO_PAGE && pool.is_idle(page);
        let reused = found.pages.iter().filter(|(page, _)| idle(&self.all, *page)).count();
        if all.saturating_sub(found.pages.len()) + reused + running > self.all.available() {
            return false;
        }
        self.windows.as_ref().is_none_or(|Windows { cache, pool }| {
            let held = found.window_pages.iter().filter(|page| **page != NO_PAGE).count();
            let reused = found.window_pages.iter().filter(|page| idle(pool, **page)).count();
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
                self.unlist(page);
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
    pub fn register(&mut self, page: &mut u32, before: u64, tokens: &[u32]) -> u64 {
        if let Some((other, number)) = self.find(before, tokens) {
            if other != *page {
                self.hold(other);
                let mut own = vec![std::mem::replace(page, other)];
                self.release(&mut own);
            }
            return number;
        }
        self.number += 1;
        let content = Content { before, tokens: tokens.into() };
        self.known.insert(content.clone(), *page);
        self.pages[*page as usize].known = Some((self.number, content));
        self.number
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

    fn unlist(&mut self, page: u32) {
        if let Some((_, content)) = self.pages[page as usize].known.take() {
            self.known.remove(&content);
        }
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
        let one = pool.register(&mut first, ROOT, &[1, 2]);
        let two = pool.register(&mut second, one, &[3, 4]);
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
        let number = pool.register(&mut a, ROOT, &[9]);
        assert_eq!(pool.register(&mut b, ROOT, &[9]), number);
        assert_eq!(a, b);
        assert_eq!(pool.held(), 1);
        pool.release(&mut vec![a]);
        assert_eq!(pool.held(), 1);
        pool.release(&mut vec![b]);
        assert_eq!((pool.held(), pool.available()), (0, 4));
    }
}
