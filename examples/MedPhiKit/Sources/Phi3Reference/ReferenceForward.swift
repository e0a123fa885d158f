import Foundation
import Phi3Core

/// Which keys each query sees.
public enum AttentionMask: Sendable {
    /// Itself and those before it, as far as the model's sliding window reaches.
    case causal
    /// What the numbers leave visible: (rows, columns), added to the scores of the first `columns`
    /// positions of the cache, as a package with a mask input has it.
    case additive([Float], columns: Int)
}

extension ReferenceModel {
    /// Which rows' logits are wanted.
    public enum Output: Sendable, Equatable {
        /// Of every row, one after the other.
        case all
        /// Of one row.
        case row(Int)
        /// None: the tokens are only read.
        case none
    }

    /// Logits (rows, vocabulary) of a whole sequence.
    ///
    /// - Parameter ids: at least one id.
    /// - Throws: `Phi3Error`: no ids, ids that the model does not have, or more than it was made for.
    public func logits(_ ids: [Int32]) throws -> [Float] {
        var cache = KVCache(config, length: ids.count)
        return try read(ids, cache: &cache, output: .all)
    }

    /// Reads the tokens that follow those in a cache.
    ///
    /// - Parameters:
    ///   - ids: the tokens.
    ///   - cache: what was read before; gets their keys and values.
    ///   - output: which logits are wanted.
    /// - Returns: logits, one row of the vocabulary's size for each wanted row.
    /// - Throws: `Phi3Error`: ids that the model does not have, a sequence beyond its context, or one
    ///   that needs LongRoPE's other factors than the cache has.
    public func read(
        _ ids: [Int32], cache: inout KVCache, output: Output
    ) throws -> [Float] {
        let end = cache.count + ids.count
        guard end <= longest else {
            throw Phi3Error.contextOverflow(
                ErrorDetails(
                    place: "sequence", found: "\(end) tokens",
                    expected: "at most \(longest)", advice: "Shorten the conversation.")
            )
        }
        if config.usesLongFactors(length: end), !cache.usesLongFactors {
            throw Phi3Error.generation(
                ErrorDetails(
                    place: "cache", found: "keys made with LongRoPE's short factors",
                    expected: "the long ones, which \(end) tokens need",
                    advice: "Read the sequence again with a new cache."))
        }
        return try step(
            ids, at: cache.count, cache: &cache, mask: .causal,
            usesLongFactors: cache.usesLongFactors, output: output)
    }

    /// Reads tokens at a position of a cache, as one call of a package with fixed shapes does.
    ///
    /// - Parameters:
    ///   - ids: the tokens, padding included.
    ///   - position: where the first one's keys and values go, and its rotary position.
    ///   - cache: keys and values; those at the position are overwritten.
    ///   - mask: which keys each query sees.
    ///   - usesLongFactors: which of LongRoPE's factors rotate the tokens.
    ///   - output: which logits are wanted.
    /// - Throws: `Phi3Error`: no ids, ids that the model does not have, or a mask of another shape.
    public func step(
        _ ids: [Int32], at position: Int, cache: inout KVCache, mask: AttentionMask,
        usesLongFactors: Bool, output: Output
    ) throws -> [Float] {
        try check(ids, position, mask, output)
        let rows = ids.count
        cache.reserve(upTo: position + rows)
        let room = Scratch(config, rows: rows)
        let turn = Rotation(config, rotary, position: position, rows: rows, long: usesLongFactors)
        for (row, id) in ids.enumerated() {
            embedding.copy(row: Int(id), into: room.h + row * config.hiddenSize)
        }
        for (layer, block) in blocks.enumerated() {
            attend(block, layer, room, turn, position, mask, &cache)
            feedForward(block, room)
        }
        return logits(room, output)
    }

    private func check(
        _ ids: [Int32], _ position: Int, _ mask: AttentionMask, _ output: Output
    ) throws {
        func refused(_ found: String, _ expected: String) -> Phi3Error {
            .input(
                ErrorDetails(
                    place: "tokens", found: found, expected: expected,
                    advice: "Encode the text with the model's own tokenizer."))
        }
        if ids.isEmpty || position < 0 { throw refused("no tokens", "at least one") }
        if let rotary, position + ids.count > rotary.context {
            throw refused(
                "position \(position + ids.count - 1)", "positions below \(rotary.context)")
        }
        for id in ids where id < 0 || Int(id) >= config.vocabSize {
            throw refused("id \(id)", "ids from 0 to \(config.vocabSize - 1)")
        }
        if case .row(let row) = output, !ids.indices.contains(row) {
            throw refused("row \(row)", "a row of \(ids.count)")
        }
        if case .additive(let numbers, let columns) = mask {
            guard columns >= position + ids.count, numbers.count == ids.count * columns else {
                throw refused(
                    "a mask of \(numbers.count) numbers", "\(ids.count) rows of \(columns)")
            }
        }
    }

    /// h += attention of the normalised h.
    private func attend(
        _ block: Block, _ layer: Int, _ room: Scratch, _ turn: Rotation, _ position: Int,
        _ mask: AttentionMask, _ cache: inout KVCache
    ) {
        let rows = room.rows
        let size = config.headSize
        let width = config.queryWidth + 2 * config.keyValueWidth
        normalise(room.h, block.inputNorm, rows, into: room.x)
        block[.qkv].apply(room.x, rows: rows, into: room.wide)
        for row in 0..<rows {
            for head in 0..<config.headCount + config.keyValueHeadCount {
                turn.turn(room.wide + row * width + head * size, row: row)
            }
        }
        let keys = room.wide + config.queryWidth
        cache.store(
            rows, layer: layer, at: position, keys: keys, values: keys + config.keyValueWidth,
            stride: width)
        let attention = Attention(
            config: config, rows: rows, position: position, mask: mask, queries: room.wide,
            out: room.mixed)
        attention.run(cache.keys[layer], cache.values[layer])
        block[.o].apply(room.mixed, rows: rows, into: room.x)
        Kernels.add(1, room.x, to: room.h, rows * config.hiddenSize)
    }

    /// h += down(silu(gate) · up) of the normalised h.
    private func feedForward(_ block: Block, _ room: Scratch) {
        let rows = room.rows
        let inner = config.intermediateSize
        normalise(room.h, block.innerNorm, rows, into: room.x)
        block[.gateUp].apply(room.x, rows: rows, into: room.wide)
        nonisolated(unsafe) let wide = room.wide
        nonisolated(unsafe) let mixed = room.mixed
        Kernels.share(rows, work: rows * inner * 16) { range in
            for row in range {
                let gate = wide + row * 2 * inner
                let up = gate + inner
                let out = mixed + row * inner
                var i = 0
                while i < inner {
                    out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]
                    i &+= 1
                }
            }
        }
        block[.down].apply(room.mixed, rows: rows, into: room.x)
        Kernels.add(1, room.x, to: room.h, rows * config.hiddenSize)
    }

    private func logits(_ room: Scratch, _ output: Output) -> [Float] {
        let first: Int
        let count: Int
        switch output {
        case .none: return []
        case .all: (first, count) = (0, room.rows)
        case .row(let row): (first, count) = (row, 1)
        }
        normalise(room.h + first * config.hiddenSize, lastNorm, count, into: room.x)
        let size = config.vocabSize
        return [Float](unsafeUninitializedCapacity: count * size) { out, filled in
            if let out = out.baseAddress {
                (head ?? embedding).apply(room.x, rows: count, into: out)
            }
            filled = count * size
        }
    }

    /// x / √(mean x² + ε) · weight, row by row.
    private func normalise(
        _ from: UnsafePointer<Float>, _ weight: [Float], _ rows: Int,
        into to: UnsafeMutablePointer<Float>
    ) {
        let size = config.hiddenSize
        weight.withUnsafeBufferPointer { weight in
            for row in 0..<rows {
                let x = from + row * size
                let out = to + row * size
                let mean = Kernels.dot(x, x, size) / Float(size)
                let factor = 1 / (mean + Float(config.normEpsilon)).squareRoot()
                var i = 0
                while i < size {
                    out[i] = x[i] * factor * weight[i]
                    i &+= 1
                }
            }
        }
    }
}

/// Room for the numbers of one reading.
final class Scratch {
    let rows: Int
    /// The residual stream, (rows, hidden).
    let h: UnsafeMutablePointer<Float>
    /// What goes into a projection, or comes back to the stream, (rows, hidden).
    let x: UnsafeMutablePointer<Float>
    /// Queries, keys and values, or gate and up.
    let wide: UnsafeMutablePointer<Float>
    /// What attention or the gate gives.
    let mixed: UnsafeMutablePointer<Float>

    init(_ config: ModelConfig, rows: Int) {
        self.rows = rows
        let attention = config.queryWidth + 2 * config.keyValueWidth
        h = .allocate(capacity: rows * config.hiddenSize)
        x = .allocate(capacity: rows * config.hiddenSize)
        wide = .allocate(capacity: rows * max(attention, 2 * config.intermediateSize))
        mixed = .allocate(capacity: rows * max(config.queryWidth, config.intermediateSize))
    }

    deinit {
        for room in [h, x, wide, mixed] { room.deallocate() }
    }
}
