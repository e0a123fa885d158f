import Dispatch
import Foundation

#if canImport(Accelerate)
    import Accelerate
#endif

/// Multiplications, vectorised and spread over the processor's cores.
///
/// Without Accelerate every product of a row and a column is summed in one order, whatever else is
/// computed beside it: reading a prompt at once or token by token gives the same bits.
enum Kernels {
    /// Products below this many multiplications are not worth waking another core.
    private static let worthSharing = 200_000
    /// Rows of the input that are multiplied while some rows of the weight are near.
    private static let tile = 16

    /// y = x Wᵀ for a weight (outputs, inputs) in single precision.
    ///
    /// - Parameters:
    ///   - x: (rows, inputs).
    ///   - w: (outputs, inputs).
    ///   - y: (rows, outputs), overwritten.
    static func multiply(
        _ x: UnsafePointer<Float>, rows: Int, inputs: Int, _ w: UnsafePointer<Float>, outputs: Int,
        into y: UnsafeMutablePointer<Float>
    ) {
        #if canImport(Accelerate)
            if rows * inputs * outputs > 4096 {
                return accelerated(x, rows: rows, inputs: inputs, w, outputs: outputs, into: y)
            }
        #endif
        nonisolated(unsafe) let x = x
        nonisolated(unsafe) let w = w
        nonisolated(unsafe) let y = y
        share(outputs, work: rows * inputs * outputs) { range in
            block(x, rows, inputs, w + range.lowerBound * inputs, range, outputs, y)
        }
    }

    /// The same for a weight that gives its rows by a closure, a few at a time.
    ///
    /// - Parameters:
    ///   - decode: writes rows of the weight; called from several threads at once.
    static func multiply(
        _ x: UnsafePointer<Float>, rows: Int, inputs: Int, outputs: Int,
        into y: UnsafeMutablePointer<Float>,
        decode: @Sendable (Range<Int>, UnsafeMutableBufferPointer<Float>) -> Void
    ) {
        nonisolated(unsafe) let x = x
        nonisolated(unsafe) let y = y
        share(outputs, work: rows * inputs * outputs) { range in
            withUnsafeTemporaryAllocation(of: Float.self, capacity: 4 * inputs) { room in
                guard let base = room.baseAddress else { return }
                var output = range.lowerBound
                while output < range.upperBound {
                    let some = output..<min(output + 4, range.upperBound)
                    decode(some, room)
                    block(x, rows, inputs, base, some, outputs, y)
                    output = some.upperBound
                }
            }
        }
    }

    /// Runs `body` for parts of 0..<count, on all cores where the work is worth it.
    static func share(_ count: Int, work: Int, _ body: @Sendable (Range<Int>) -> Void) {
        let cores = ProcessInfo.processInfo.activeProcessorCount
        let parts = min(cores, max(1, work / worthSharing), max(1, count))
        if parts <= 1 { return body(0..<count) }
        // Parts begin on a multiple of four, so that rows are multiplied four at a time.
        let size = ((count + parts - 1) / parts + 3) / 4 * 4
        DispatchQueue.concurrentPerform(iterations: parts) { part in
            let begin = min(part * size, count)
            let end = min(begin + size, count)
            if begin < end { body(begin..<end) }
        }
    }

    /// Rows `range` of the weight, the first of which lies at `w`, against all rows of the input.
    private static func block(
        _ x: UnsafePointer<Float>, _ rows: Int, _ inputs: Int, _ w: UnsafePointer<Float>,
        _ range: Range<Int>, _ outputs: Int, _ y: UnsafeMutablePointer<Float>
    ) {
        var top = 0
        while top < rows {
            let bottom = min(top &+ tile, rows)
            var output = range.lowerBound
            var row = w
            while output &+ 4 <= range.upperBound {
                var t = top
                while t < bottom {
                    let sums = dot4(x + t &* inputs, row, inputs)
                    let out = y + (t &* outputs &+ output)
                    out[0] = sums.x
                    out[1] = sums.y
                    out[2] = sums.z
                    out[3] = sums.w
                    t &+= 1
                }
                output &+= 4
                row += 4 &* inputs
            }
            while output < range.upperBound {
                var t = top
                while t < bottom {
                    y[t &* outputs &+ output] = dot(x + t &* inputs, row, inputs)
                    t &+= 1
                }
                output &+= 1
                row += inputs
            }
            top = bottom
        }
    }

    @inline(__always)
    private static func load(_ at: UnsafePointer<Float>) -> SIMD8<Float> {
        UnsafeRawPointer(at).loadUnaligned(as: SIMD8<Float>.self)
    }

    /// The lanes' sum in a fixed order.
    @inline(__always)
    private static func total(_ lanes: SIMD8<Float>) -> Float {
        let four = lanes.lowHalf + lanes.highHalf
        let two = four.lowHalf + four.highHalf
        return two.x + two.y
    }

    /// The product of two vectors, summed in eight lanes.
    static func dot(_ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>, _ count: Int) -> Float {
        // Unoptimised vectors are fifteen times slower than plain numbers, and give the same bits.
        #if DEBUG
            return plainDot(a, b, count)
        #else
            return vectorDot(a, b, count)
        #endif
    }

    /// The lanes as vectors.
    static func vectorDot(
        _ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>, _ count: Int
    ) -> Float {
        var sum = SIMD8<Float>.zero
        var i = 0
        while i &+ 8 <= count {
            sum += load(a + i) * load(b + i)
            i &+= 8
        }
        var result = total(sum)
        while i < count {
            result += a[i] * b[i]
            i &+= 1
        }
        return result
    }

    /// The same lanes as plain numbers.
    static func plainDot(
        _ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>, _ count: Int
    ) -> Float {
        var s0: Float = 0
        var s1: Float = 0
        var s2: Float = 0
        var s3: Float = 0
        var s4: Float = 0
        var s5: Float = 0
        var s6: Float = 0
        var s7: Float = 0
        var i = 0
        while i &+ 8 <= count {
            s0 += a[i] * b[i]
            s1 += a[i &+ 1] * b[i &+ 1]
            s2 += a[i &+ 2] * b[i &+ 2]
            s3 += a[i &+ 3] * b[i &+ 3]
            s4 += a[i &+ 4] * b[i &+ 4]
            s5 += a[i &+ 5] * b[i &+ 5]
            s6 += a[i &+ 6] * b[i &+ 6]
            s7 += a[i &+ 7] * b[i &+ 7]
            i &+= 8
        }
        var result = ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))
        while i < count {
            result += a[i] * b[i]
            i &+= 1
        }
        return result
    }

    /// The products of a vector with four rows that follow each other.
    @inline(__always)
    private static func dot4(
        _ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>, _ count: Int
    ) -> SIMD4<Float> {
        let b1 = b + count
        let b2 = b1 + count
        let b3 = b2 + count
        #if DEBUG
            return SIMD4(
                dot(a, b, count), dot(a, b1, count), dot(a, b2, count), dot(a, b3, count))
        #else
            var s0 = SIMD8<Float>.zero
            var s1 = s0
            var s2 = s0
            var s3 = s0
            var i = 0
            while i &+ 8 <= count {
                let v = load(a + i)
                s0 += v * load(b + i)
                s1 += v * load(b1 + i)
                s2 += v * load(b2 + i)
                s3 += v * load(b3 + i)
                i &+= 8
            }
            var result = SIMD4(total(s0), total(s1), total(s2), total(s3))
            while i < count {
                result += a[i] * SIMD4(b[i], b1[i], b2[i], b3[i])
                i &+= 1
            }
            return result
        #endif
    }

    /// target += factor · source.
    static func add(
        _ factor: Float, _ source: UnsafePointer<Float>, to target: UnsafeMutablePointer<Float>,
        _ count: Int
    ) {
        var i = 0
        while i < count {
            target[i] += factor * source[i]
            i &+= 1
        }
    }

    #if canImport(Accelerate)
        private static func accelerated(
            _ x: UnsafePointer<Float>, rows: Int, inputs: Int, _ w: UnsafePointer<Float>,
            outputs: Int, into y: UnsafeMutablePointer<Float>
        ) {
            if rows == 1 {
                vDSP_mmul(w, 1, x, 1, y, 1, vDSP_Length(outputs), 1, vDSP_Length(inputs))
                return
            }
            // W xᵀ is yᵀ: the weight stays as it lies.
            withUnsafeTemporaryAllocation(of: Float.self, capacity: rows * (inputs + outputs)) {
                room in
                guard let turned = room.baseAddress else { return }
                let result = turned + rows * inputs
                vDSP_mtrans(x, 1, turned, 1, vDSP_Length(inputs), vDSP_Length(rows))
                vDSP_mmul(
                    w, 1, turned, 1, result, 1, vDSP_Length(outputs), vDSP_Length(rows),
                    vDSP_Length(inputs))
                vDSP_mtrans(result, 1, y, 1, vDSP_Length(rows), vDSP_Length(outputs))
            }
        }
    #endif
}
