// torch's allocator of CPU memory for `pytest --guard-pages`: every tensor has pages of its own between two that fault,
// and ends, or starts, beside one of them, so that what reads or writes past it ends the process.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

namespace {

struct Pages {
  void* first;
  size_t bytes;
};

bool at_the_end = true;
std::mutex mutex;
std::unordered_map<void*, Pages> pages_of;

void free_pages(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = pages_of.find(data);
  if (found == pages_of.end()) return;
  munmap(found->second.first, found->second.bytes);
  pages_of.erase(found);
}

struct GuardPages final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &free_pages, c10::kCPU};
    const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    void* first = mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* start = static_cast<char*>(first) + page;
    TORCH_CHECK(first != MAP_FAILED && mprotect(start, inside, PROT_READ | PROT_WRITE) == 0, "no memory");
    char* data = at_the_end ? start + inside - bytes : start;
    const std::lock_guard<std::mutex> lock(mutex);
    pages_of[data] = {first, inside + 2 * page};
    return {data, data, &free_pages, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pages; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

} // namespace

extern "C" void guard(bool ends) {
  static GuardPages allocator;
  at_the_end = ends;
  c10::SetCPUAllocator(&allocator, 255);
}
