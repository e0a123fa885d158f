import Foundation
import Phi3Core
import Phi3Reference

/// The cache of the processor backend beside a state's numbers in half precision.
///
/// The state is what counts: before each call every number of it that changed since is read again.
struct CacheMirror {
    var cache: KVCache
    /// The bytes of keys and values that the cache holds.
    private var known: [[UInt8]]

    private static let parts: [(name: String, part: KVCache.Part)] = [
        ("keyCache", .keys), ("valueCache", .values),
    ]

    /// The mirror of a state, brought up to its numbers.
    static func of(_ state: MLState, _ config: ModelConfig) -> CacheMirror {
        var mirror = state.mirror ?? CacheMirror(state, config)
        // Two owners of the cache would copy all of it at the first write.
        state.mirror = nil
        mirror.read(state)
        return mirror
    }

    private init(_ state: MLState, _ config: ModelConfig) {
        cache = KVCache(config, capacity: state.writers.count, usesLongFactors: true)
        known = CacheMirror.parts.map { name, _ in
            [UInt8](repeating: 0, count: state.arrays[name]?.bytes.count ?? 0)
        }
    }

    /// Takes over the rows that differ from what is known.
    private mutating func read(_ state: MLState) {
        for (which, (name, part)) in CacheMirror.parts.enumerated() {
            guard let array = state.arrays[name], !array.holds(known[which]) else { continue }
            let size = array.extents[3]
            CacheMirror.visit(array, 0..<array.extents[2]) { layer, head, position, place in
                let row = UnsafeRawBufferPointer(rebasing: array.bytes[place..<place + 2 * size])
                if row.elementsEqual(known[which][place..<place + 2 * size]) { return }
                known[which].replaceSubrange(place..<place + 2 * size, with: row)
                let numbers = row.bindMemory(to: UInt16.self).map { HalfFloat.value(of: $0) }
                cache.setRow(numbers, part, layer: layer, head: head, position: position)
            }
        }
    }

    /// Writes what the model computed into the state, rounded, and keeps the rounded numbers.
    mutating func store(_ positions: Range<Int>, in state: MLState) {
        for (which, (name, part)) in CacheMirror.parts.enumerated() {
            guard let array = state.arrays[name] else { continue }
            CacheMirror.visit(array, positions) { layer, head, position, place in
                let row = cache.row(part, layer: layer, head: head, position: position)
                let bits = row.map { HalfFloat.bits(of: $0) }
                bits.withUnsafeBytes { bytes in
                    UnsafeMutableRawBufferPointer(
                        rebasing: array.bytes[place..<place + bytes.count]
                    ).copyMemory(from: bytes)
                    known[which].replaceSubrange(place..<place + bytes.count, with: bytes)
                }
                let numbers = bits.map { HalfFloat.value(of: $0) }
                cache.setRow(numbers, part, layer: layer, head: head, position: position)
            }
        }
        state.mirror = self
    }

    /// All heads' rows of some positions, each with its place in memory.
    private static func visit(
        _ array: MLMultiArray, _ positions: Range<Int>, _ body: (Int, Int, Int, Int) -> Void
    ) {
        for layer in 0..<array.extents[0] {
            for head in 0..<array.extents[1] {
                for position in positions {
                    body(layer, head, position, array.place([layer, head, position, 0]))
                }
            }
        }
    }
}
