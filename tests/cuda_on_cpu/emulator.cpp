#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <set>

#include "block.h"

namespace fusedmoe::cuda_on_cpu {

Running running;

namespace {

Counts counted{};

// One launch at a time, whoever asks for it.
std::mutex launching;

// Of the launch that runs, which stay as they are until the next one.
Block* block = nullptr;
bool eager = false;

Settings from_environment() {
  Settings settings;
  if (const char* seed = std::getenv("FUSEDMOE_CUDA_SEED")) settings.seed = std::stoull(seed);
  if (const char* copies = std::getenv("FUSEDMOE_CUDA_COPIES")) {
    settings.eager = std::strcmp(copies, "eager") == 0;
    if (!settings.eager && std::strcmp(copies, "lazy"))
      throw std::invalid_argument(std::string("FUSEDMOE_CUDA_COPIES: expected lazy or eager, got ") + copies);
  }
  return settings;
}

void arrive(const Copy& copy) {
  std::memcpy(copy.to, copy.from, size_t(copy.given));
  std::memset(static_cast<char*>(copy.to) + copy.given, 0, size_t(copy.bytes - copy.given));
}

// Turns since the program began, how many of them there were before this launch, and the first one
// of the running block.
uint64_t turns = 0, turns_before = 0, first_turn = 0;
// The turns of this launch that have arrived at each number; and which of others' turns the running
// block sees.
std::map<const int*, std::set<uint64_t>> arrivals;
std::set<uint64_t> seen;

// Raises: Error if another block of this launch has written there, unless its turn is seen.
void claim(Region& region, size_t offset, size_t bytes, bool write, Site site) {
  if (!region.written_to) return;
  if (region.writers.empty()) region.writers.resize(region.bytes / 2 + 1);
  for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; i++) {
    uint64_t& writer = region.writers[i];
    if (writer > turns_before && writer < first_turn && !seen.contains(writer))
      fail(site, std::string("race: expected a ") + (write ? "store to" : "load of") +
                     " what no other block writes, got byte " + std::to_string(offset) + " of " + region.name);
    if (write) writer = turns;
  }
}

std::string text(const void* address) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%p", address);
  return digits;
}

void check_alignment(const void* first, size_t alignment, const char* what, Site site) {
  if (uintptr_t(first) % alignment)
    fail(site, std::string("misaligned ") + what + ": expected an address at a multiple of " +
                   std::to_string(alignment) + " bytes, got " + text(first));
}

// `alone`: no other block of the launch may have written there.
void touch(const void* first, size_t bytes, size_t alignment, bool write, Site site, bool alone) {
  const Unwatched books;
  check_alignment(first, alignment, write ? "store" : "load", site);
  (write ? counts().bytes_written : counts().bytes_read) += bytes;
  std::vector<Region>& all = regions();
  if (all.empty()) return;
  // Mostly it is the region of last time.
  static size_t recent = 0;
  const char* at = static_cast<const char*>(first);
  for (size_t tried = 0; tried < all.size(); tried++) {
    if (recent >= all.size()) recent = 0;
    Region& region = all[recent];
    const char* begin = static_cast<const char*>(region.first);
    if (at >= begin && at + bytes <= begin + region.bytes) {
      if (write && !region.written_to) fail(site, "outside: expected no store into " + region.name + ", got one");
      (write ? region.bytes_written : region.bytes_read) += bytes;
      if (alone) claim(region, size_t(at - begin), bytes, write, site);
      return;
    }
    recent++;
  }
  const auto nearest = std::min_element(all.begin(), all.end(), [&](const Region& a, const Region& b) {
    const auto distance = [&](const Region& r) { return std::abs(at - (static_cast<const char*>(r.first) + r.bytes)); };
    return distance(a) < distance(b);
  });
  fail(site, std::string("outside: expected a ") + (write ? "store" : "load") + " inside a tensor, got " +
                 std::to_string(bytes) + " bytes at byte " +
                 std::to_string(at - static_cast<const char*>(nearest->first)) + " of " + nearest->name +
                 ", which has " + std::to_string(nearest->bytes));
}

}  // namespace

Settings& settings() {
  static Settings now = from_environment();
  return now;
}

Counts& counts() { return counted; }

std::vector<Region>& regions() {
  static std::vector<Region> all;
  return all;
}

void run(const char* kernel, Index grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> alone(launching);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads < warp_size || threads > most_threads || threads % warp_size)
    throw Error(std::string(kernel) + ": expected a multiple of 32 threads, at most 1024, got " +
                std::to_string(threads));
  if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw Error(std::string(kernel) + ": expected a grid of 1 to 2147483647 by 65535 by 65535 blocks, got " +
                std::to_string(grid.x) + " by " + std::to_string(grid.y) + " by " + std::to_string(grid.z));
  if (shared_bytes > most_shared_bytes)
    throw Error(std::string(kernel) + ": expected at most " + std::to_string(most_shared_bytes) +
                " bytes of shared memory, got " + std::to_string(shared_bytes));
  Draws draws(settings().seed);
  const bool drawn = settings().seed != 0;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (drawn)
    for (uint64_t left = blocks; left > 1; left--) std::swap(order[left - 1], order[draws.next() % left]);
  static Block only;
  block = &only;
  eager = settings().eager;
  running.grid = grid;
  counts().launches++;
  block->set_up(kernel, threads, shared_bytes, body);
  turns_before = turns;
  arrivals.clear();
  for (uint64_t i : order) {
    first_turn = ++turns;
    seen.clear();
    block->run({unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)},
               drawn ? &draws : nullptr);
    counts().blocks++;
  }
}

void fail(Site site, const std::string& message) { throw Error(block->where(site) + ": " + message); }

void sync_block(Site site) { block->sync(site); }

void together(const Together& operation, Site site, void* brought) { block->together(operation, site, brought); }

int arrive(int* counter, Site site) {
  touch(counter, sizeof(int), sizeof(int), true, site, false);
  block->switch_point();
  const Unwatched books;
  std::set<uint64_t>& here = arrivals[counter];
  seen.insert(here.begin(), here.end());
  // Hand on also what was handed on to this block.
  here.insert(seen.begin(), seen.end());
  for (uint64_t turn = first_turn; turn <= turns; turn++) here.insert(turn);
  turns++;
  return (*counter)++;
}

void copy_async(void* to, const void* from, int bytes, int given, Site site) {
  check_shared(to, size_t(bytes), "copy_async", site);
  if (given < 0 || given > bytes)
    fail(site, "expected copy_async of 0 to " + std::to_string(bytes) + " bytes, got " + std::to_string(given));
  check_alignment(from, size_t(bytes), "source of copy_async", site);
  if (given) touch_global(from, size_t(given), 1, false, site);
  block->switch_point();
  const Copy copy{to, from, bytes, given};
  if (eager) arrive(copy);
  const Unwatched books;
  block->current().copies.push_back(copy);
}

void commit_copies() {
  const Unwatched books;
  Thread& self = block->current();
  self.groups.push_back(self.copies.size());
}

void wait_copies(size_t but) {
  block->switch_point();
  std::vector<Copy> due;
  {
    const Unwatched books;
    Thread& self = block->current();
    if (self.groups.size() <= but) return;
    const auto last = self.groups.end() - ptrdiff_t(but);
    const size_t count = last[-1];
    due.assign(self.copies.begin(), self.copies.begin() + ptrdiff_t(count));
    self.copies.erase(self.copies.begin(), self.copies.begin() + ptrdiff_t(count));
    self.groups.erase(self.groups.begin(), last);
    for (size_t& end : self.groups) end -= count;
  }
  if (!eager)
    for (const Copy& copy : due) arrive(copy);
}

void check_shared(const void* first, size_t bytes, const char* what, Site site) {
  check_alignment(first, bytes, what, site);
  if (!block->has_shared(first, bytes))
    fail(site, std::string("outside: expected ") + what + " of " + std::to_string(bytes) +
                   " bytes inside shared memory, got byte " +
                   std::to_string(static_cast<const char*>(first) - running.shared) + " of it");
}

void touch_global(const void* first, size_t bytes, size_t alignment, bool write, Site site) {
  touch(first, bytes, alignment, write, site, true);
}

}  // namespace fusedmoe::cuda_on_cpu
