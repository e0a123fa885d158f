import Foundation

/// How a `BundleStore` fetches.
public struct StoreOptions: Sendable {
    /// Whether the network may be used at all. Off unless an app says otherwise.
    public var allowsNetwork: Bool
    /// How often a file is asked for without a byte coming, before the store gives up.
    public var attempts: Int
    /// How long it waits before it asks a second time; twice as long each time after that.
    public var firstDelay: Duration
    /// The longest it waits, also where a server asks for more.
    public var longestDelay: Duration
    /// How long a connection may give nothing.
    public var stall: Duration

    /// Makes options.
    public init(
        allowsNetwork: Bool = false, attempts: Int = 5, firstDelay: Duration = .seconds(1),
        longestDelay: Duration = .seconds(60), stall: Duration = .seconds(60)
    ) {
        self.allowsNetwork = allowsNetwork
        self.attempts = attempts
        self.firstDelay = firstDelay
        self.longestDelay = longestDelay
        self.stall = stall
    }

    /// The wait before another attempt.
    func delay(attempt: Int, asked: Int?) -> Duration {
        var delay = firstDelay
        for _ in 1..<max(1, min(attempt, 32)) where delay < longestDelay { delay = delay * 2 }
        if let asked { delay = max(delay, .seconds(min(asked, 86_400))) }
        return min(delay, longestDelay)
    }

    /// - Throws: `Phi3Error.option` for numbers that make no sense.
    func validate() throws {
        func wrong(_ name: String, _ found: String, _ expected: String) -> Phi3Error {
            .option(
                ErrorDetails(
                    place: name, found: found, expected: expected,
                    advice: "Choose a value in range."))
        }
        if !(1...1000).contains(attempts) {
            throw wrong("attempts", "\(attempts)", "1 to 1000")
        }
        if firstDelay < .zero || longestDelay < .zero {
            throw wrong("firstDelay, longestDelay", "less than nothing", "0 or more")
        }
        if stall <= .zero { throw wrong("stall", "\(stall)", "more than 0") }
    }
}

/// Something that happens while a bundle is installed.
public enum InstallEvent: Sendable, Equatable {
    /// What is to be fetched is known: files and bytes, less those that are here already.
    case listed(files: Int, bytes: Int)
    /// Bytes of all files so far and in all, those that were here included.
    case receiving(path: String, done: Int, total: Int)
    /// A file will be asked for again, and why.
    case waiting(path: String, seconds: Double, reason: String)
    /// Everything is here and right; the bundle is moved to its place.
    case installing
}

/// A bundle in a store.
public struct InstalledBundle: Sendable, Equatable {
    /// What it was installed as.
    public let name: String
    /// Its folder.
    public let url: URL
    /// Which version it is: the SHA-256 of its `SHA256SUMS`.
    public let version: String
    /// Whether the version before is kept; see `BundleStore.rollback(_:)`.
    public let hasPrevious: Bool
}

/// The disk, as the store uses it; tests put a full one in its place.
struct StoreDisk: Sendable {
    /// Bytes that are free where a folder lies; `nil`: not known.
    var free: @Sendable (URL) -> Int?
    /// Writes bytes and returns how many, or -1 with `errno`.
    var write: @Sendable (Int32, UnsafeRawBufferPointer) -> Int

    static let system = StoreDisk(
        free: { folder in
            #if canImport(Darwin)
                let key = URLResourceKey.volumeAvailableCapacityForImportantUsageKey
                let values = try? folder.resourceValues(forKeys: [key])
                if let free = values?.volumeAvailableCapacityForImportantUsage, free > 0 {
                    return Int(free)
                }
            #endif
            let facts = try? FileManager.default.attributesOfFileSystem(forPath: folder.path)
            return (facts?[.systemFreeSize] as? NSNumber)?.intValue
        },
        write: { systemWrite($0, $1.baseAddress, $1.count) })
}

private func systemWrite(_ descriptor: Int32, _ bytes: UnsafeRawPointer?, _ count: Int) -> Int {
    write(descriptor, bytes, count)
}
