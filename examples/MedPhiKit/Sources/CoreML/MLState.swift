import Phi3Core
import Phi3Reference
import Synchronization

/// What functions keep between calls.
///
/// It remembers who wrote each slot of the cache, so that a call that sees keys of another adapter, of
/// LongRoPE's other set, of padding, or none at all, is found.
public class MLState {
    let package: CompiledPackage
    let arrays: [String: MLMultiArray]
    /// Who wrote each slot; `nil`: nobody, or a row that only filled a block up.
    var writers: [SlotWriter?]
    /// The cache as the model computes with it, and the bits it was made from.
    var mirror: CacheMirror?
    /// The model with the adapter that is in the slots, the bytes of those, and how often they were
    /// others before.
    var adapted: (bytes: [[UInt8]], changes: Int, model: ReferenceModel)?

    private let isBusy = Mutex(false)

    init(package: CompiledPackage, states: [Manifest.TensorFacts]) {
        self.package = package
        arrays = Dictionary(
            states.map { ($0.name, MLMultiArray($0.shape, .init($0.type), filledWith: 0)) }
        ) { first, _ in first }
        let cache = states.first { $0.name == "keyCache" }
        writers = Array(repeating: nil, count: cache.map { $0.shape[2] } ?? 0)
    }

    /// Gives access to a state's numbers, which lie somewhere else every time.
    ///
    /// - Parameters:
    ///   - stateName: a state of the function it was made by; Apple's stops the process at any other.
    ///   - body: gets the array; it must not be kept.
    public func withMultiArray<R>(
        for stateName: String, _ body: (MLMultiArray) throws -> R
    ) rethrows -> R {
        guard let array = arrays[stateName] else { fatalError("no state named \(stateName)") }
        if isBusy.withLock({ $0 }) { package.bench.note("a state was touched in a prediction") }
        array.move()
        defer { array.move() }
        return try body(array)
    }

    /// Leaves no number of the cache as it was: nobody says what a state holds after a failure.
    func spoil() {
        for name in ["keyCache", "valueCache"] {
            arrays[name]?.bytes.initializeMemory(as: UInt8.self, repeating: 0xFF)
        }
        writers = Array(repeating: nil, count: writers.count)
    }

    /// Runs a prediction; refuses where another one is under way.
    func exclusively<R>(_ body: () throws -> R) throws -> R {
        let wasBusy = isBusy.withLock { busy in
            defer { busy = true }
            return busy
        }
        if wasBusy {
            package.bench.note("two predictions at once used one state")
            throw failure(6, "two predictions at once use one state")
        }
        defer { isBusy.withLock { $0 = false } }
        return try body()
    }
}

/// Who wrote a slot of the cache.
struct SlotWriter: Equatable {
    /// The adapter that is built in.
    let builtIn: String?
    /// How often adapter slots had changed.
    let changes: Int
    /// Whether LongRoPE's long factors turned it.
    let isLong: Bool
}
