/* Initialization, the device, contexts, the words of errors, and how functions are found by their names. */
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

pthread_mutex_t driver_lock = PTHREAD_MUTEX_INITIALIZER;
bool initialized;
CUresult sticky;
__thread Context *current;
__thread bool in_host_function;
Context primary = {CONTEXT};

void unlock_driver(int *unused) {
    (void)unused;
    pthread_mutex_unlock(&driver_lock);
}

/* Whether the calling thread may use the device now. */
CUresult context_state(const char *function) {
    if (in_host_function) {
        misuse("%s was called in a host function", function);
        return CUDA_ERROR_NOT_PERMITTED;
    }
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    return sticky;
}

/* CUDA_STAND_IN_INIT is the error of a driver that does not start. */
API(cuInit, unsigned flags) {
    LOCKED;
    const char *error = getenv("CUDA_STAND_IN_INIT");
    NEED(!flags, CUDA_ERROR_INVALID_VALUE);
    NEED(!error, (CUresult)atoi(error));
    memory_begin();
    initialized = true;
    return CUDA_SUCCESS;
}

API(cuDriverGetVersion, int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

API(cuDeviceGetCount, int *count) {
    NEED(initialized, CUDA_ERROR_NOT_INITIALIZED);
    *count = 1;
    return CUDA_SUCCESS;
}

API(cuDeviceGet, CUdevice *device, int ordinal) {
    NEED(initialized, CUDA_ERROR_NOT_INITIALIZED);
    NEED(ordinal == 0, CUDA_ERROR_INVALID_DEVICE);
    *device = 0;
    return CUDA_SUCCESS;
}

API(cuDeviceGetName, char *name, int size, CUdevice device) {
    NEED(device == 0, CUDA_ERROR_INVALID_DEVICE);
    snprintf(name, size, "Stand-in GPU");
    return CUDA_SUCCESS;
}

API(cuDeviceGetUuid, CUuuid *uuid, CUdevice device) {
    NEED(device == 0, CUDA_ERROR_INVALID_DEVICE);
    memcpy(uuid->bytes, "stand-in, no gpu", 16);
    return CUDA_SUCCESS;
}

/* CUDA_STAND_IN_CAPABILITY is the compute capability, with two digits. */
static const char *capability(void) {
    const char *given = getenv("CUDA_STAND_IN_CAPABILITY");
    return given ? given : "8.9";
}

API(cuDeviceGetAttribute, int *value, CUdevice_attribute attribute, CUdevice device) {
    NEED(device == 0, CUDA_ERROR_INVALID_DEVICE);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability()[0] - '0'; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability()[2] - '0'; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: *value = 1; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}

API(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device) {
    NEED(initialized, CUDA_ERROR_NOT_INITIALIZED);
    NEED(device == 0, CUDA_ERROR_INVALID_DEVICE);
    *context = &primary;
    return CUDA_SUCCESS;
}

API(cuDevicePrimaryCtxRelease, CUdevice device) {
    NEED(device == 0, CUDA_ERROR_INVALID_DEVICE);
    return CUDA_SUCCESS;
}

API(cuCtxSetCurrent, CUcontext context) {
    NEED(initialized, CUDA_ERROR_NOT_INITIALIZED);
    NEED(!context || context->tag == CONTEXT, CUDA_ERROR_INVALID_CONTEXT);
    current = context;
    return CUDA_SUCCESS;
}

API(cuCtxGetCurrent, CUcontext *context) {
    NEED(initialized, CUDA_ERROR_NOT_INITIALIZED);
    *context = current;
    return CUDA_SUCCESS;
}

API(cuCtxGetDevice, CUdevice *device) {
    NEED(current, CUDA_ERROR_INVALID_CONTEXT);
    *device = 0;
    return CUDA_SUCCESS;
}

API(cuCtxGetStreamPriorityRange, int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}

/* The errors that the stand-in returns or that a test asks for, with the driver's words. */
static const struct { CUresult code; const char *name, *text; } errors[] = {
#define ERROR(code, text) {code, #code, text}
    ERROR(CUDA_SUCCESS, "no error"),
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(CUDA_ERROR_STUB_LIBRARY, "CUDA driver is a stub library"),
    ERROR(CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable"),
    ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    ERROR(CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized"),
    ERROR(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "system has unsupported display driver / cuda driver combination"),
    ERROR(CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, "forward compatibility was attempted on non supported HW"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture sequence from another thread"),
    ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};

API(cuGetErrorName, CUresult code, const char **name) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return *name = errors[i].name, CUDA_SUCCESS;
    return *name = NULL, CUDA_ERROR_INVALID_VALUE;
}

API(cuGetErrorString, CUresult code, const char **text) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return *text = errors[i].text, CUDA_SUCCESS;
    return *text = NULL, CUDA_ERROR_INVALID_VALUE;
}

/* NVIDIA's CUDA runtime asks the driver for private tables, by which the driver proves that it is NVIDIA's. This is not NVIDIA's
 * driver, so it has none, and that runtime does not start on it. */
API(cuGetExportTable, const void **table, const CUuuid *id) {
    (void)id;
    *table = NULL;
    return CUDA_ERROR_NOT_FOUND;
}

/* Functions are exported under the names that cuda.h gives them, which may end in a version. Those that are missing are not
 * found. */
API(cuGetProcAddress, const char *name, void **function, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *status) {
    static const char *const endings[] = {"_v3", "_v2", ""};
    static void *self;
    Dl_info here;
    (void)version, (void)flags;
    if (!self && dladdr((void *)cuInit, &here)) self = dlopen(here.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    *function = NULL;
    for (int i = 0; !*function && i < 3; i++) {
        char exported[128];
        snprintf(exported, sizeof exported, "%s%s", name, endings[i]);
        *function = dlsym(self, exported);
    }
    if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
