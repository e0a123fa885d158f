import Foundation

/// Numbers as a file stores them: their kind, their shape, and their bytes, which may be mapped.
public struct Tensor: Sendable {
    /// The kind of the numbers.
    public let type: TensorType
    /// The extents; the last one runs fastest.
    public let shape: [Int]
    /// The bytes, little end first.
    public let data: Data

    /// A tensor from its parts; the caller has checked that they go together.
    init(type: TensorType, shape: [Int], data: Data) {
        self.type = type
        self.shape = shape
        self.data = data
    }

    /// A tensor from numbers, rounded to nearest even where the kind is narrower.
    ///
    /// - Parameters:
    ///   - values: as many as the shape says.
    ///   - shape: the extents.
    ///   - type: F32, F16 or BF16; others are stored as F32.
    public init(_ values: [Float], shape: [Int], as type: TensorType = .f32) {
        switch type {
        case .f16: data = Tensor.bytes(values.map { HalfFloat.bits(of: $0).littleEndian })
        case .bf16: data = Tensor.bytes(values.map { BFloat.bits(of: $0).littleEndian })
        default: data = Tensor.bytes(values.map { $0.bitPattern.littleEndian })
        }
        self.type = type.isWeight ? type : .f32
        self.shape = shape
    }

    /// How many numbers there are.
    public var count: Int { data.count / type.size }

    /// The numbers of an F32, F16 or BF16 tensor in single precision; empty for other kinds.
    public func floats() -> [Float] {
        guard type.isWeight else { return [] }
        return [Float](unsafeUninitializedCapacity: count) { room, filled in
            data.withUnsafeBytes { Tensor.decode($0, type, into: room) }
            filled = count
        }
    }

    /// Whether every number of an F32, F16 or BF16 tensor is finite.
    public var isFinite: Bool {
        data.withUnsafeBytes { bytes in
            switch type {
            case .f32:
                return Tensor.all(bytes, UInt32.self) { $0 & 0x7F80_0000 != 0x7F80_0000 }
            case .f16: return Tensor.all(bytes, UInt16.self) { $0 & 0x7C00 != 0x7C00 }
            case .bf16: return Tensor.all(bytes, UInt16.self) { $0 & 0x7F80 != 0x7F80 }
            default: return true
            }
        }
    }

    /// Whether every number is zero.
    public var isZero: Bool {
        data.withUnsafeBytes { bytes in
            switch type {
            case .f32: return Tensor.all(bytes, UInt32.self) { $0 & 0x7FFF_FFFF == 0 }
            case .f16, .bf16: return Tensor.all(bytes, UInt16.self) { $0 & 0x7FFF == 0 }
            default: return Tensor.all(bytes, UInt8.self) { $0 == 0 }
            }
        }
    }

    /// A matrix with rows and columns exchanged, bit for bit; other shapes as they are.
    public func transposed() -> Tensor {
        guard shape.count == 2 else { return self }
        let rows = shape[0]
        let columns = shape[1]
        let size = type.size
        var turned = Data(count: data.count)
        turned.withUnsafeMutableBytes { target in
            data.withUnsafeBytes { source in
                guard let to = target.baseAddress, let from = source.baseAddress else { return }
                for row in 0..<rows {
                    for column in 0..<columns {
                        (to + (column * rows + row) * size).copyMemory(
                            from: from + (row * columns + column) * size, byteCount: size)
                    }
                }
            }
        }
        return Tensor(type: type, shape: [columns, rows], data: turned)
    }

    /// Decodes F32, F16 or BF16 bytes; as many numbers as both sides have room for.
    public static func decode(
        _ bytes: UnsafeRawBufferPointer, _ type: TensorType,
        into room: UnsafeMutableBufferPointer<Float>
    ) {
        let count = min(room.count, bytes.count / type.size)
        guard count > 0, let from = bytes.baseAddress, let to = room.baseAddress else { return }
        var i = 0
        switch type {
        case .f32:
            while i < count {
                let bits = from.loadUnaligned(fromByteOffset: i &* 4, as: UInt32.self)
                to[i] = Float(bitPattern: UInt32(littleEndian: bits))
                i &+= 1
            }
        case .f16:
            while i < count {
                let bits = from.loadUnaligned(fromByteOffset: i &* 2, as: UInt16.self)
                to[i] = HalfFloat.value(of: UInt16(littleEndian: bits))
                i &+= 1
            }
        default:
            while i < count {
                let bits = from.loadUnaligned(fromByteOffset: i &* 2, as: UInt16.self)
                to[i] = BFloat.value(of: UInt16(littleEndian: bits))
                i &+= 1
            }
        }
    }

    private static func all<Word: FixedWidthInteger>(
        _ bytes: UnsafeRawBufferPointer, _ word: Word.Type, _ holds: (Word) -> Bool
    ) -> Bool {
        var at = 0
        while at + MemoryLayout<Word>.size <= bytes.count {
            let bits = Word(littleEndian: bytes.loadUnaligned(fromByteOffset: at, as: Word.self))
            if !holds(bits) { return false }
            at += MemoryLayout<Word>.size
        }
        return true
    }

    private static func bytes<Word>(_ words: [Word]) -> Data { words.withUnsafeBytes { Data($0) } }
}

/// Half precision by its bits, so that one code runs where Swift has no `Float16`.
public enum HalfFloat {
    /// The largest finite number.
    public static let largest: Float = 65504

    /// The number that some bits mean, exactly.
    @inline(__always)
    public static func value(of bits: UInt16) -> Float {
        let sign = UInt32(bits & 0x8000) << 16
        let rest = UInt32(bits & 0x7FFF)
        if rest >= 0x7C00 {  // infinite, or no number
            return Float(bitPattern: sign | 0x7F80_0000 | (rest & 0x03FF) << 13)
        }
        // Multiplying moves the exponent, of subnormal numbers too.
        let shifted = Float(bitPattern: rest << 13) * Float(bitPattern: 0x7780_0000)
        return Float(bitPattern: shifted.bitPattern | sign)
    }

    /// The bits nearest to a number, ties to even; beyond the range they mean infinity.
    public static func bits(of value: Float) -> UInt16 {
        let all = value.bitPattern
        let sign = UInt16(truncatingIfNeeded: all >> 16) & 0x8000
        let rest = all & 0x7FFF_FFFF
        if rest > 0x7F80_0000 { return sign | 0x7E00 }
        if rest >= 0x477F_F000 { return sign | 0x7C00 }
        if rest < 0x3880_0000 {  // subnormal: adding 0.5 leaves the rounded bits at the end
            let sum = Float(bitPattern: rest) + 0.5
            return sign | UInt16(truncatingIfNeeded: sum.bitPattern &- 0x3F00_0000)
        }
        let odd = (rest >> 13) & 1
        return sign | UInt16(truncatingIfNeeded: (rest &- 0x3800_0000 &+ 0x0FFF &+ odd) >> 13)
    }
}

/// The upper half of single precision, by its bits.
public enum BFloat {
    /// The number that some bits mean, exactly.
    @inline(__always)
    public static func value(of bits: UInt16) -> Float { Float(bitPattern: UInt32(bits) << 16) }

    /// The bits nearest to a number, ties to even.
    public static func bits(of value: Float) -> UInt16 {
        let all = value.bitPattern
        if all & 0x7FFF_FFFF > 0x7F80_0000 { return UInt16(truncatingIfNeeded: all >> 16) | 0x40 }
        return UInt16(truncatingIfNeeded: (all &+ 0x7FFF &+ ((all >> 16) & 1)) >> 16)
    }
}
