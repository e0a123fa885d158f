import Foundation

/// A weight of a checkpoint as its file stores it, plain or quantised by MLX, decoded row by row.
public struct WeightMatrix: Sendable {
    /// Outputs.
    public let rows: Int
    /// Inputs.
    public let columns: Int
    private let storage: Storage

    private enum Storage: Sendable {
        case plain(TensorType, Data)
        case affine(AffineQuantization.Form, codes: Data, scales: Tensor, biases: Tensor)
    }

    /// The weight of a layer such as `model.layers.0.mlp.down_proj`.
    ///
    /// - Returns: `nil` where the checkpoint has no such matrix.
    public init?(_ checkpoint: Checkpoint, layer: String) {
        guard let weight = checkpoint.tensor("\(layer).weight"), weight.shape.count == 2 else {
            return nil
        }
        rows = weight.shape[0]
        if let form = checkpoint.quantizedLayers[layer] {
            guard let scales = checkpoint.tensor("\(layer).scales"),
                let biases = checkpoint.tensor("\(layer).biases")
            else { return nil }
            columns = weight.shape[1] * 32 / form.bits
            storage = .affine(form, codes: weight.data, scales: scales, biases: biases)
        } else {
            columns = weight.shape[1]
            storage = .plain(weight.type, weight.data)
        }
    }

    /// Bytes in the file.
    public var byteCount: Int {
        switch storage {
        case .plain(_, let data): return data.count
        case .affine(_, let codes, let scales, let biases):
            return codes.count + scales.data.count + biases.data.count
        }
    }

    /// One row in single precision.
    public func row(_ index: Int) -> [Float] {
        [Float](unsafeUninitializedCapacity: columns) { room, filled in
            decode(rows: index..<index + 1, into: room)
            filled = columns
        }
    }

    /// All rows in single precision, one after the other.
    public func floats() -> [Float] {
        [Float](unsafeUninitializedCapacity: rows * columns) { room, filled in
            decode(rows: 0..<rows, into: room)
            filled = rows * columns
        }
    }

    /// Decodes some rows.
    ///
    /// - Parameters:
    ///   - range: rows of the matrix.
    ///   - room: has place for them.
    public func decode(rows range: Range<Int>, into room: UnsafeMutableBufferPointer<Float>) {
        precondition(range.lowerBound >= 0 && range.upperBound <= rows)
        precondition(room.count >= range.count * columns)
        switch storage {
        case .plain(let type, let data):
            let width = columns * type.size
            data.withUnsafeBytes { bytes in
                let part = bytes[range.lowerBound * width..<range.upperBound * width]
                Tensor.decode(UnsafeRawBufferPointer(rebasing: part), type, into: room)
            }
        case .affine(let form, let codes, let scales, let biases):
            codes.withUnsafeBytes { codes in
                scales.data.withUnsafeBytes { steps in
                    biases.data.withUnsafeBytes { lows in
                        let group = AffineRows(
                            form: form, columns: columns, codes: codes,
                            steps: (steps, scales.type), lows: (lows, biases.type))
                        for (place, row) in range.enumerated() {
                            group.decode(
                                row,
                                into: UnsafeMutableBufferPointer(
                                    rebasing: room[place * columns..<(place + 1) * columns]))
                        }
                    }
                }
            }
        }
    }
}

/// MLX's affine groups: w = scale · code + bias, codes packed as a stream of bits, low bits first.
private struct AffineRows {
    let form: AffineQuantization.Form
    let columns: Int
    let codes: UnsafeRawBufferPointer
    let steps: (bytes: UnsafeRawBufferPointer, type: TensorType)
    let lows: (bytes: UnsafeRawBufferPointer, type: TensorType)

    func decode(_ row: Int, into room: UnsafeMutableBufferPointer<Float>) {
        let bits = form.bits
        let groups = columns / form.groupSize
        let width = columns * bits / 8
        guard let start = codes.baseAddress, let out = room.baseAddress else { return }
        let bytes = start + row * width
        let mask: UInt32 = (1 << UInt32(bits)) - 1
        for group in 0..<groups {
            let step = number(steps, row * groups + group)
            let low = number(lows, row * groups + group)
            var column = group * form.groupSize
            let end = column + form.groupSize
            while column < end {
                let at = column &* bits
                // A code of at most 8 bits lies in two bytes; the last row has none after its own.
                let byte = at &>> 3
                var pair = UInt32(bytes.load(fromByteOffset: byte, as: UInt8.self))
                if (at & 7) &+ bits > 8 {
                    pair |= UInt32(bytes.load(fromByteOffset: byte &+ 1, as: UInt8.self)) &<< 8
                }
                let code = (pair &>> UInt32(at & 7)) & mask
                out[column] = step * Float(code) + low
                column &+= 1
            }
        }
    }

    private func number(_ source: (bytes: UnsafeRawBufferPointer, type: TensorType), _ at: Int)
        -> Float
    {
        switch source.type {
        case .f32:
            let bits = source.bytes.loadUnaligned(fromByteOffset: at * 4, as: UInt32.self)
            return Float(bitPattern: UInt32(littleEndian: bits))
        case .f16:
            let bits = source.bytes.loadUnaligned(fromByteOffset: at * 2, as: UInt16.self)
            return HalfFloat.value(of: UInt16(littleEndian: bits))
        default:
            let bits = source.bytes.loadUnaligned(fromByteOffset: at * 2, as: UInt16.self)
            return BFloat.value(of: UInt16(littleEndian: bits))
        }
    }
}
