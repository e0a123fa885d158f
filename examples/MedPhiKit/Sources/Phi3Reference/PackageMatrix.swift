import Foundation
import Phi3Core

/// A weight that gives its rows one after the other in single precision.
protocol RowSource: Sendable {
    /// Outputs.
    var rows: Int { get }
    /// Inputs.
    var columns: Int { get }

    /// Decodes some rows into room for them.
    func decode(rows range: Range<Int>, into room: UnsafeMutableBufferPointer<Float>)
}

extension RowSource {
    /// All rows, one after the other.
    func floats() -> [Float] {
        [Float](unsafeUninitializedCapacity: rows * columns) { room, filled in
            decode(rows: 0..<rows, into: room)
            filled = rows * columns
        }
    }
}

extension WeightMatrix: RowSource {}

/// A weight of a package as its weight file stores it.
struct PackageMatrix: RowSource {
    /// How numbers are stored.
    enum Form: Sendable {
        /// In half precision.
        case half(Data)
        /// As codes.
        case codes(Codes)
    }

    /// Codes with a scale, and perhaps an offset, for each group of a row:
    /// w = (code − offset) · scale, rounded to half precision once.
    struct Codes: Sendable {
        let bytes: Data
        let kind: PackageProgram.Kind
        let scales: Data
        let offsets: Data?
        let offsetKind: PackageProgram.Kind?
        /// Groups of a row.
        let groups: Int
    }

    let rows: Int
    let columns: Int
    let form: Form

    func decode(rows range: Range<Int>, into room: UnsafeMutableBufferPointer<Float>) {
        guard range.lowerBound >= 0, range.upperBound <= rows,
            room.count >= range.count * columns
        else { return }
        switch form {
        case .half(let data):
            data.withUnsafeBytes { bytes in
                let width = columns * 2
                let part = bytes[range.lowerBound * width..<range.upperBound * width]
                Tensor.decode(UnsafeRawBufferPointer(rebasing: part), .f16, into: room)
            }
        case .codes(let codes):
            codes.bytes.withUnsafeBytes { bytes in
                codes.scales.withUnsafeBytes { scales in
                    (codes.offsets ?? Data()).withUnsafeBytes { offsets in
                        for (place, row) in range.enumerated() {
                            decode(
                                row, codes, bytes, scales, offsets,
                                into: UnsafeMutableBufferPointer(
                                    rebasing: room[place * columns..<(place + 1) * columns]))
                        }
                    }
                }
            }
        }
    }

    private func decode(
        _ row: Int, _ codes: Codes, _ bytes: UnsafeRawBufferPointer,
        _ scales: UnsafeRawBufferPointer, _ offsets: UnsafeRawBufferPointer,
        into out: UnsafeMutableBufferPointer<Float>
    ) {
        let size = columns / codes.groups
        for group in 0..<codes.groups {
            let at = row * codes.groups + group
            let scale = PackageMatrix.number(scales, .float16, at)
            let offset = codes.offsetKind.map { PackageMatrix.number(offsets, $0, at) } ?? 0
            for column in group * size..<(group + 1) * size {
                let code = PackageMatrix.number(bytes, codes.kind, row * columns + column)
                out[column] = HalfFloat.value(of: HalfFloat.bits(of: (code - offset) * scale))
            }
        }
    }

    /// One number; those of four bits lie two in a byte, the lower half first.
    @inline(__always)
    private static func number(
        _ bytes: UnsafeRawBufferPointer, _ kind: PackageProgram.Kind, _ at: Int
    ) -> Float {
        switch kind {
        case .float16:
            let bits = bytes.loadUnaligned(fromByteOffset: at &* 2, as: UInt16.self)
            return HalfFloat.value(of: UInt16(littleEndian: bits))
        case .uint8: return Float(bytes[at])
        case .int8: return Float(Int8(bitPattern: bytes[at]))
        case .uint4:
            let pair = bytes[at &>> 1]
            return Float(at & 1 == 0 ? pair & 15 : pair &>> 4)
        }
    }
}
