/* Device memory, its pool, and pinned host memory.
 *
 * Addresses of device memory cannot be read or written by the host: they are in a mapping without any access. The bytes are in a
 * second mapping of the same size.
 */
#define _GNU_SOURCE
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MEMORY_SIZE ((size_t)4 << 30)
#define GRANULE ((size_t)512)
#define PAGE ((uintptr_t)4096)
#define RUBBISH 0xFB                      /* fresh memory: as float16 and float32 large and negative, as an index far outside */
#define LARGEST_SPOILED ((size_t)16 << 20)

typedef struct Block {
    CUdeviceptr address;
    size_t size, wanted; /* with and without rounding */
    bool used;
    struct Block *previous, *next;
} Block;

typedef struct Pinned {
    char *address;
    size_t size;
    struct Pinned *next;
} Pinned;

static char *device_base, *bytes_base;
static Block *blocks; /* all of the memory, in the order of the addresses */
static Pinned *pinned;
static size_t pinned_bytes;
static Pool pool = {POOL, 0, 0, 0};

void memory_begin(void) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (blocks) return;
    device_base = mmap(NULL, MEMORY_SIZE, PROT_NONE, flags, -1, 0);
    bytes_base = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (device_base == MAP_FAILED || bytes_base == MAP_FAILED) {
        perror("the stand-in for the CUDA driver: no address space");
        abort();
    }
    blocks = calloc(1, sizeof *blocks);
    *blocks = (Block){.address = (CUdeviceptr)device_base, .size = MEMORY_SIZE};
}

size_t memory_used(void) { return pool.used; }
size_t memory_reserved(void) { return pool.reserved; }
size_t pinned_used(void) { return pinned_bytes; }

static Block *block_of(CUdeviceptr address) {
    for (Block *block = blocks; block; block = block->next)
        if (block->used && address >= block->address && address < block->address + block->size) return block;
    return NULL;
}

static bool is_pinned(CUdeviceptr address, size_t size) {
    for (Pinned *at = pinned; at; at = at->next)
        if (address >= (CUdeviceptr)at->address && address + size <= (CUdeviceptr)at->address + at->size) return true;
    return false;
}

/* Where the host finds the bytes of a range. NULL unless all of it is one live allocation, on the device or of pinned memory. */
char *bytes_at(CUdeviceptr address, size_t size) {
    Block *block = block_of(address);
    if (block) return address + size <= block->address + block->wanted ? bytes_base + (address - (CUdeviceptr)device_base) : NULL;
    return is_pinned(address, size) ? (char *)address : NULL;
}

static CUresult take_block(CUdeviceptr *address, size_t size) {
    size_t rounded = (size + GRANULE - 1) / GRANULE * GRANULE;
    for (Block *block = blocks; block; block = block->next) {
        if (block->used || block->size < rounded) continue;
        if (block->size > rounded) {
            Block *rest = calloc(1, sizeof *rest);
            *rest = (Block){block->address + rounded, block->size - rounded, 0, false, block, block->next};
            if (rest->next) rest->next->previous = rest;
            block->next = rest;
            block->size = rounded;
        }
        block->used = true;
        block->wanted = size;
        pool.used += rounded;
        if (pool.reserved < pool.used) pool.reserved = pool.used;
        *address = block->address;
        if (size <= LARGEST_SPOILED) memset(bytes_at(*address, size), RUBBISH, size);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

static void join_with_next(Block *block) {
    Block *next = block->next;
    if (!next || block->used || next->used) return;
    block->size += next->size;
    block->next = next->next;
    if (block->next) block->next->previous = block;
    free(next);
}

/* Free a block. It is one: cuMemFreeAsync has checked it, and a double free is caught there too, unless it was enqueued twice. */
void release_block(CUdeviceptr address) {
    Block *block = block_of(address);
    if (!block || block->address != address) {
        misuse("memory was freed twice");
        return;
    }
    uintptr_t start = (uintptr_t)bytes_base + (address - (CUdeviceptr)device_base);
    uintptr_t first = (start + PAGE - 1) / PAGE * PAGE, end = (start + block->size) / PAGE * PAGE;
    if (end > first) madvise((void *)first, end - first, MADV_DONTNEED); /* whole pages go back to the system */
    block->used = false;
    pool.used -= block->size;
    join_with_next(block);
    if (block->previous) join_with_next(block->previous);
}

API(cuDeviceTotalMem, size_t *bytes, CUdevice device) {
    NEED(device == 0, CUDA_ERROR_INVALID_DEVICE);
    *bytes = MEMORY_SIZE;
    return CUDA_SUCCESS;
}

API(cuMemGetInfo, size_t *free_bytes, size_t *total) {
    LOCKED;
    NEED_CONTEXT;
    *free_bytes = MEMORY_SIZE - pool.reserved;
    *total = MEMORY_SIZE;
    return CUDA_SUCCESS;
}

API(cuDeviceGetDefaultMemPool, CUmemoryPool *found, CUdevice device) {
    NEED(device == 0, CUDA_ERROR_INVALID_DEVICE);
    *found = &pool;
    return CUDA_SUCCESS;
}

API(cuDeviceGetMemPool, CUmemoryPool *found, CUdevice device) { return cuDeviceGetDefaultMemPool(found, device); }

API(cuMemPoolGetAttribute, CUmemoryPool handle, CUmemPool_attribute attribute, void *value) {
    LOCKED;
    NEED_HANDLE(handle, POOL);
    switch (attribute) {
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: *(cuuint64_t *)value = handle->threshold; break;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: *(cuuint64_t *)value = handle->reserved; break;
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT: *(cuuint64_t *)value = handle->used; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

API(cuMemPoolSetAttribute, CUmemoryPool handle, CUmemPool_attribute attribute, void *value) {
    LOCKED;
    NEED_HANDLE(handle, POOL);
    NEED(attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CUDA_ERROR_NOT_SUPPORTED);
    handle->threshold = *(cuuint64_t *)value;
    return CUDA_SUCCESS;
}

API(cuMemPoolTrimTo, CUmemoryPool handle, size_t kept) {
    LOCKED;
    NEED_HANDLE(handle, POOL);
    if (handle->reserved > kept) handle->reserved = handle->used > kept ? handle->used : kept;
    return CUDA_SUCCESS;
}

API(cuMemAllocFromPoolAsync, CUdeviceptr *address, size_t size, CUmemoryPool handle, CUstream stream) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(handle, POOL);
    NEED_HANDLE(stream, STREAM);
    NEED(size, CUDA_ERROR_INVALID_VALUE);
    NEED(!stream->graph, CUDA_ERROR_NOT_SUPPORTED); /* memory that a graph owns */
    CUresult result = take_block(address, size);
    if (result != CUDA_ERROR_OUT_OF_MEMORY) return result;
    run_until(stream, stream->enqueued); /* memory whose free is enqueued before can be used */
    return take_block(address, size);
}

API(cuMemFreeAsync, CUdeviceptr address, CUstream stream) {
    LOCKED;
    NEED(current, CUDA_ERROR_INVALID_CONTEXT);
    NEED_HANDLE(stream, STREAM);
    Block *block = block_of(address);
    if (!block || block->address != address) {
        misuse("%#llx was freed, which is no live allocation", address);
        return CUDA_ERROR_INVALID_VALUE;
    }
    NEED(!unsafe_call(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED); /* as the driver 580 does, on every stream */
    if (stream->graph) { /* a graph may only free what it allocated */
        stream->broken = true;
        misuse("memory was freed on a stream that is captured");
        return CUDA_ERROR_INVALID_VALUE;
    }
    return enqueue(stream, (Work){.kind = FREE, .target = address});
}

API(cuMemAllocHost, void **address, size_t size) {
    LOCKED;
    NEED_CONTEXT;
    NEED(!unsafe_call(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    Pinned *made = calloc(1, sizeof *made);
    char *memory = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
    NEED(memory, CUDA_ERROR_OUT_OF_MEMORY);
    *made = (Pinned){memory, size, pinned};
    pinned = made;
    pinned_bytes += size;
    *address = memory;
    return CUDA_SUCCESS;
}

API(cuMemFreeHost, void *address) {
    LOCKED;
    NEED(!unsafe_call(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    run_all(); /* as the driver does: copies that are under way may use it */
    for (Pinned **at = &pinned; *at; at = &(*at)->next) {
        if ((*at)->address != address) continue;
        Pinned *gone = *at;
        *at = gone->next;
        pinned_bytes -= gone->size;
        free(gone->address);
        free(gone);
        return CUDA_SUCCESS;
    }
    misuse("%p was freed, which is no pinned memory", address);
    return CUDA_ERROR_INVALID_VALUE;
}

/* Copies are asynchronous only from and to pinned memory, so `CudaDevice` must use no other. */
static CUresult copy(CUdeviceptr target, CUdeviceptr source, size_t size, Stream *stream) {
    NEED_HANDLE(stream, STREAM);
    NEED(size, CUDA_SUCCESS);
    if (!bytes_at(target, size) || !bytes_at(source, size)) {
        misuse("a copy of %zu bytes from %#llx to %#llx leaves the live allocations", size, source, target);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return enqueue(stream, (Work){.kind = COPY, .target = target, .source = source, .size = size});
}

API(cuMemcpyHtoDAsync, CUdeviceptr target, const void *source, size_t size, CUstream stream) {
    LOCKED;
    NEED_CONTEXT;
    return copy(target, (CUdeviceptr)source, size, stream);
}

API(cuMemcpyDtoHAsync, void *target, CUdeviceptr source, size_t size, CUstream stream) {
    LOCKED;
    NEED_CONTEXT;
    return copy((CUdeviceptr)target, source, size, stream);
}

API(cuMemcpyDtoDAsync, CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    LOCKED;
    NEED_CONTEXT;
    return copy(target, source, size, stream);
}

API(cuMemsetD8Async, CUdeviceptr address, unsigned char value, size_t size, CUstream stream) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(stream, STREAM);
    NEED(size, CUDA_SUCCESS);
    if (!bytes_at(address, size)) {
        misuse("a memset of %zu bytes at %#llx leaves the live allocations", size, address);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return enqueue(stream, (Work){.kind = FILL, .target = address, .value = value, .size = size});
}
