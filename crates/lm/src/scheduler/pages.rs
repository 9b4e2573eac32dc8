//! The cache pages: who holds which, and which of those that nobody holds are still worth something.

use std::collections::BTreeMap;
use std::sync::Arc;

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
        debug_assert_eq!(tokens.len(), self.page_len);
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
