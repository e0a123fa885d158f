import Foundation
import Phi3Core

/// Scaled dot-product attention of some new rows over a layer's cache.
struct Attention {
    let config: ModelConfig
    let rows: Int
    let position: Int
    let mask: AttentionMask
    /// (rows, query heads and then keys and values).
    let queries: UnsafePointer<Float>
    /// (rows, query heads), overwritten.
    let out: UnsafeMutablePointer<Float>

    /// Computes all heads of all rows, shared between the cores.
    func run(_ keys: [Float], _ values: [Float]) {
        let heads = config.headCount
        let length = longest
        let work = rows * heads * length * config.headSize * 2
        nonisolated(unsafe) let this = self
        keys.withUnsafeBufferPointer { keys in
            values.withUnsafeBufferPointer { values in
                guard let first = keys.baseAddress, let other = values.baseAddress else { return }
                nonisolated(unsafe) let k = first
                nonisolated(unsafe) let v = other
                Kernels.share(rows * heads, work: work) { range in
                    withUnsafeTemporaryAllocation(of: Float.self, capacity: length) { scores in
                        guard let scores = scores.baseAddress else { return }
                        for unit in range { this.one(unit / heads, unit % heads, k, v, scores) }
                    }
                }
            }
        }
    }

    private var longest: Int {
        if case .additive(_, let columns) = mask { return columns }
        return position + rows
    }

    /// The positions that a row sees, without what an additive mask hides.
    private func visible(_ row: Int) -> Range<Int> {
        if case .additive(_, let columns) = mask { return 0..<columns }
        let end = position + row + 1
        return max(0, end - (config.slidingWindow ?? end))..<end
    }

    private func one(
        _ row: Int, _ head: Int, _ keys: UnsafePointer<Float>, _ values: UnsafePointer<Float>,
        _ scores: UnsafeMutablePointer<Float>
    ) {
        let size = config.headSize
        let width = config.keyValueWidth
        let shift = head / (config.headCount / config.keyValueHeadCount) * size
        let query = queries + row * (config.queryWidth + 2 * width) + head * size
        let scale = 1 / Float(size).squareRoot()
        let range = visible(row)
        var largest = -Float.infinity
        for j in range {
            scores[j] = Kernels.dot(query, keys + j * width + shift, size) * scale
        }
        if case .additive(let numbers, let columns) = mask {
            for j in range { scores[j] += numbers[row * columns + j] }
        }
        for j in range { largest = max(largest, scores[j]) }
        var sum: Float = 0
        for j in range {
            scores[j] = exp(scores[j] - largest)
            sum += scores[j]
        }
        let target = out + row * config.queryWidth + head * size
        target.update(repeating: 0, count: size)
        for j in range where scores[j] != 0 {
            Kernels.add(scores[j] / sum, values + j * width + shift, to: target, size)
        }
    }
}
