// Memory that ends where its numbers end: a read or write behind them stops the program, a write in
// front of them is found afterwards. With FUSEDMOE_TEST_HEAP it is the heap's, whose blocks an
// address sanitizer watches at both ends.
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if !defined(FUSEDMOE_TEST_HEAP)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fusedmoe::test {

#if defined(FUSEDMOE_TEST_HEAP)
constexpr bool heap = true;
#else
constexpr bool heap = false;
#endif

// `count` numbers, at no better an alignment than their own.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : bytes_(count * sizeof(T)) { allocate(); }
  explicit Guarded(const std::vector<T>& values) : Guarded(values.size()) {
    if (bytes_) std::memcpy(first_, values.data(), bytes_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() const { return first_; }
  void fill(T value) {
    for (size_t i = 0; i < bytes_ / sizeof(T); i++) first_[i] = value;
  }
  std::vector<T> values() const { return std::vector<T>(first_, first_ + bytes_ / sizeof(T)); }
  bool holds(const std::vector<T>& values) const {
    return values.size() * sizeof(T) == bytes_ && (!bytes_ || std::memcmp(first_, values.data(), bytes_) == 0);
  }

#if defined(FUSEDMOE_TEST_HEAP)
  ~Guarded() { std::free(first_); }
  bool intact() const { return true; }

 private:
  void allocate() {
    first_ = static_cast<T*>(std::malloc(bytes_ ? bytes_ : 1));
    if (!first_) throw std::bad_alloc();
  }
#else
  ~Guarded() { munmap(pages_, all_); }
  // Whether nothing was written in front of the numbers.
  bool intact() const {
    for (const unsigned char* p = pages_; p < reinterpret_cast<unsigned char*>(first_); p++)
      if (*p != mark) return false;
    return true;
  }

 private:
  static constexpr unsigned char mark = 0xa5;

  // [marked bytes, the numbers][a page that may not be touched]
  void allocate() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), open = (bytes_ + page) / page * page;
    all_ = open + page;
    void* pages = mmap(nullptr, all_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<unsigned char*>(pages);
    if (mprotect(pages_ + open, page, PROT_NONE)) throw std::bad_alloc();
    first_ = reinterpret_cast<T*>(pages_ + open - bytes_);
    std::memset(pages_, mark, open - bytes_);
  }

  unsigned char* pages_ = nullptr;
  size_t all_ = 0;
#endif
  size_t bytes_;
  T* first_ = nullptr;
};

}  // namespace fusedmoe::test
