import Foundation

#if canImport(Darwin)
    import Darwin
    import os
#elseif canImport(Glibc)
    import Glibc
#endif

/// What the system says of memory, asked when it is needed: there is no table of devices.
public enum SystemMemory {
    /// Bytes this process may still take; `nil` where the system does not say.
    ///
    /// On iOS that is the app's own limit; on a Mac and on Linux what is free or can be freed.
    public static func available() -> Int? {
        #if os(iOS) || os(visionOS)
            let bytes = os_proc_available_memory()
            return bytes > 0 ? bytes : nil
        #elseif os(macOS)
            return freePages()
        #elseif os(Linux)
            return field("MemAvailable", of: "/proc/meminfo")
        #else
            return nil
        #endif
    }

    /// The most bytes this process has had in memory so far; `nil` where the system does not say.
    public static func peak() -> Int? {
        #if os(Linux)
            // The resource usage of a process also counts the one it was started from.
            return field("VmHWM", of: "/proc/self/status")
        #elseif canImport(Darwin)
            var usage = rusage()
            guard getrusage(RUSAGE_SELF, &usage) == 0 else { return nil }
            return Int(usage.ru_maxrss)
        #else
            return nil
        #endif
    }

    #if os(macOS)
        private static func freePages() -> Int? {
            var statistics = vm_statistics64()
            var count = mach_msg_type_number_t(
                MemoryLayout<vm_statistics64>.size / MemoryLayout<integer_t>.size)
            let result = withUnsafeMutablePointer(to: &statistics) { pointer in
                pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                    host_statistics64(mach_host_self(), HOST_VM_INFO64, $0, &count)
                }
            }
            guard result == KERN_SUCCESS else { return nil }
            // What files fill and what apps call purgeable is given up as soon as it is needed.
            let pages =
                Int(statistics.free_count) + Int(statistics.inactive_count)
                + Int(statistics.purgeable_count) + Int(statistics.speculative_count)
            return pages * Int(getpagesize())
        }
    #endif

    #if os(Linux)
        private static func field(_ name: String, of path: String) -> Int? {
            guard let text = try? String(contentsOfFile: path, encoding: .utf8) else { return nil }
            for line in text.split(separator: "\n") where line.hasPrefix("\(name):") {
                let words = line.split(whereSeparator: { $0 == " " || $0 == "\t" })
                if words.count > 1, let kilobytes = Int(words[1]) { return kilobytes * 1024 }
            }
            return nil
        }
    #endif
}
