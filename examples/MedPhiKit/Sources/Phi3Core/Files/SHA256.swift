import Foundation

/// SHA-256 (FIPS 180-4) in Swift alone, so that hashes are the same code on every system.
public struct SHA256: Sendable {
    private var state = HashState()
    private var pending: [UInt8] = []
    private var count: UInt64 = 0

    /// The hash of nothing yet.
    public init() {
        pending.reserveCapacity(64)
    }

    /// Adds bytes.
    public mutating func update(_ bytes: UnsafeRawBufferPointer) {
        count &+= UInt64(bytes.count)
        var at = 0
        if !pending.isEmpty {
            at = min(64 - pending.count, bytes.count)
            pending.append(contentsOf: bytes[..<at])
            guard pending.count == 64 else { return }
            pending.withUnsafeBytes { compress($0, blocks: 1) }
            pending.removeAll(keepingCapacity: true)
        }
        let blocks = (bytes.count - at) / 64
        if blocks > 0 {
            compress(UnsafeRawBufferPointer(rebasing: bytes[at...]), blocks: blocks)
            at += blocks * 64
        }
        pending.append(contentsOf: bytes[at...])
    }

    /// Adds bytes.
    public mutating func update(_ data: Data) {
        data.withUnsafeBytes { update($0) }
    }

    /// Adds a text's UTF-8.
    public mutating func update(_ text: String) {
        var copy = text
        copy.withUTF8 { update(UnsafeRawBufferPointer($0)) }
    }

    /// The hash of everything added, in 64 hexadecimal digits.
    public func hexDigest() -> String {
        var last = self
        let bits = count &* 8
        var tail: [UInt8] = [0x80]
        let used = (pending.count + 1) % 64
        tail += [UInt8](repeating: 0, count: (used <= 56 ? 56 : 120) - used)
        for shift in stride(from: 56, through: 0, by: -8) {
            tail.append(UInt8(truncatingIfNeeded: bits >> UInt64(shift)))
        }
        tail.withUnsafeBytes { last.update($0) }
        return last.state.words.map { word in
            let digits = String(word, radix: 16)
            return String(repeating: "0", count: 8 - digits.count) + digits
        }.joined()
    }

    /// The hash of some bytes.
    public static func hex(_ data: Data) -> String {
        var hash = SHA256()
        hash.update(data)
        return hash.hexDigest()
    }

    /// The hash of a file, read in pieces of 4 MiB.
    ///
    /// - Parameters:
    ///   - url: the file.
    ///   - progress: called with the bytes of each piece.
    /// - Throws: `Phi3Error.unreadable`.
    public static func hex(
        contentsOf url: URL, progress: ((Int) throws -> Void)? = nil
    ) throws -> String {
        var hash = SHA256()
        try FileBytes.pieces(of: url) { piece in
            hash.update(piece)
            try progress?(piece.count)
        }
        return hash.hexDigest()
    }

    private mutating func compress(_ bytes: UnsafeRawBufferPointer, blocks: Int) {
        guard let base = bytes.baseAddress else { return }
        SHA256.constants.withUnsafeBufferPointer { constants in
            guard let k = constants.baseAddress else { return }
            for block in 0..<blocks { state.take(HashBlock(base + block * 64), k) }
        }
    }

    /// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
    private static let constants: [UInt32] = [
        0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4,
        0xab1c_5ed5, 0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe,
        0x9bdc_06a7, 0xc19b_f174, 0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f,
        0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da, 0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7,
        0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967, 0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc,
        0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85, 0xa2bf_e8a1, 0xa81a_664b,
        0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070, 0x19a4_c116,
        0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
        0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7,
        0xc671_78f2,
    ]
}

@inline(__always)
private func rotate(_ x: UInt32, _ n: UInt32) -> UInt32 { x &>> n | x &<< (32 &- n) }

/// Sixteen words of a message. They are no array, so that they stay in registers: a loop over an
/// array of all 64 is a fifth slower.
private struct HashBlock {
    typealias Eight = (UInt32, UInt32, UInt32, UInt32, UInt32, UInt32, UInt32, UInt32)
    var low: Eight
    var high: Eight

    @inline(__always)
    init(_ bytes: UnsafeRawPointer) {
        func word(_ at: Int) -> UInt32 {
            UInt32(bigEndian: bytes.loadUnaligned(fromByteOffset: at &* 4, as: UInt32.self))
        }
        low = (word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7))
        high = (word(8), word(9), word(10), word(11), word(12), word(13), word(14), word(15))
    }

    /// The sixteen words that follow from these.
    @inline(__always)
    mutating func extend() {
        next(&low.0, low.1, high.1, high.6)
        next(&low.1, low.2, high.2, high.7)
        next(&low.2, low.3, high.3, low.0)
        next(&low.3, low.4, high.4, low.1)
        next(&low.4, low.5, high.5, low.2)
        next(&low.5, low.6, high.6, low.3)
        next(&low.6, low.7, high.7, low.4)
        next(&low.7, high.0, low.0, low.5)
        next(&high.0, high.1, low.1, low.6)
        next(&high.1, high.2, low.2, low.7)
        next(&high.2, high.3, low.3, high.0)
        next(&high.3, high.4, low.4, high.1)
        next(&high.4, high.5, low.5, high.2)
        next(&high.5, high.6, low.6, high.3)
        next(&high.6, high.7, low.7, high.4)
        next(&high.7, low.0, high.0, high.5)
    }
}

/// A word of a message from those 16, 15, 7 and 2 before it.
@inline(__always)
private func next(_ word: inout UInt32, _ x: UInt32, _ middle: UInt32, _ y: UInt32) {
    let s0 = rotate(x, 7) ^ rotate(x, 18) ^ (x &>> 3)
    let s1 = rotate(y, 17) ^ rotate(y, 19) ^ (y &>> 10)
    word = word &+ s0 &+ middle &+ s1
}

/// The eight words that a message is mixed into.
private struct HashState: Sendable {
    private var sum: HashBlock.Eight = (
        0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a,
        0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19
    )

    var words: [UInt32] { [sum.0, sum.1, sum.2, sum.3, sum.4, sum.5, sum.6, sum.7] }

    mutating func take(_ block: HashBlock, _ k: UnsafePointer<UInt32>) {
        var block = block
        let old = sum
        mix(block.low, k)
        mix(block.high, k + 8)
        block.extend()
        mix(block.low, k + 16)
        mix(block.high, k + 24)
        block.extend()
        mix(block.low, k + 32)
        mix(block.high, k + 40)
        block.extend()
        mix(block.low, k + 48)
        mix(block.high, k + 56)
        sum = (
            old.0 &+ sum.0, old.1 &+ sum.1, old.2 &+ sum.2, old.3 &+ sum.3,
            old.4 &+ sum.4, old.5 &+ sum.5, old.6 &+ sum.6, old.7 &+ sum.7
        )
    }

    /// Eight of the 64 steps. The names move by one each time; written out, nothing else has to.
    @inline(__always)
    private mutating func mix(_ w: HashBlock.Eight, _ k: UnsafePointer<UInt32>) {
        var (a, b, c, d, e, f, g, h) = sum
        step(a, b, c, &d, e, f, g, &h, k[0] &+ w.0)
        step(h, a, b, &c, d, e, f, &g, k[1] &+ w.1)
        step(g, h, a, &b, c, d, e, &f, k[2] &+ w.2)
        step(f, g, h, &a, b, c, d, &e, k[3] &+ w.3)
        step(e, f, g, &h, a, b, c, &d, k[4] &+ w.4)
        step(d, e, f, &g, h, a, b, &c, k[5] &+ w.5)
        step(c, d, e, &f, g, h, a, &b, k[6] &+ w.6)
        step(b, c, d, &e, f, g, h, &a, k[7] &+ w.7)
        sum = (a, b, c, d, e, f, g, h)
    }
}

/// One of the 64 steps; `kw` is the step's constant and word.
@inline(__always)
private func step(
    _ a: UInt32, _ b: UInt32, _ c: UInt32, _ d: inout UInt32, _ e: UInt32, _ f: UInt32,
    _ g: UInt32, _ h: inout UInt32, _ kw: UInt32
) {
    let choice = g ^ (e & (f ^ g))
    let majority = (a & b) ^ (c & (a ^ b))
    let first = h &+ (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) &+ choice &+ kw
    d = d &+ first
    h = first &+ (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) &+ majority
}
