/// Random numbers that are those of the Python package: one key for (seed, number of the token),
/// and MLX's numbers for a key.
enum RandomBits {
    /// The key of a draw: NumPy's `SeedSequence([seed, number]).generate_state(2)`.
    static func key(seed: UInt64, number: Int) -> (UInt32, UInt32) {
        let state = SeedSequence(words(seed) + words(UInt64(number.magnitude))).state(2)
        return (state[0], state[1])
    }

    /// A number as its 32-bit words, the lowest first, without leading zeros.
    private static func words(_ value: UInt64) -> [UInt32] {
        let high = UInt32(value >> 32)
        return [UInt32(truncatingIfNeeded: value)] + (high > 0 ? [high] : [])
    }

    /// Calls `body` with each place of `count` and MLX's random word for it.
    ///
    /// The words come in pairs, of which the second lies half of the places further on.
    static func forEach(
        count: Int, key: (UInt32, UInt32), _ body: (_ place: Int, _ word: UInt32) -> Void
    ) {
        let half = count / 2
        let second = half + count % 2
        for place in 0..<half {
            let pair = threefry(
                key, (UInt32(truncatingIfNeeded: place), UInt32(truncatingIfNeeded: place + second))
            )
            body(place, pair.0)
            body(place + second, pair.1)
        }
        if count % 2 == 1 { body(half, threefry(key, (UInt32(truncatingIfNeeded: half), 0)).0) }
    }

    /// A random word as a number from 0 to below 1, as MLX makes it.
    static func uniform(_ word: UInt32) -> Float {
        min(Float(word) / Float(UInt32.max), Float(1).nextDown)
    }

    /// Threefry-2x32 with twenty rounds (Salmon and others, 2011), as JAX and MLX use it.
    static func threefry(
        _ key: (UInt32, UInt32), _ counter: (UInt32, UInt32)
    ) -> (UInt32, UInt32) {
        let keys = (key.0, key.1, key.0 ^ key.1 ^ 0x1BD1_1BDA)
        var a = counter.0 &+ keys.0
        var b = counter.1 &+ keys.1
        func round(_ bits: UInt32) {
            a = a &+ b
            b = (b &<< bits | b &>> (32 &- bits)) ^ a
        }
        func even() {
            round(13)
            round(15)
            round(26)
            round(6)
        }
        func odd() {
            round(17)
            round(29)
            round(16)
            round(24)
        }
        even()
        (a, b) = (a &+ keys.1, b &+ keys.2 &+ 1)
        odd()
        (a, b) = (a &+ keys.2, b &+ keys.0 &+ 2)
        even()
        (a, b) = (a &+ keys.0, b &+ keys.1 &+ 3)
        odd()
        (a, b) = (a &+ keys.1, b &+ keys.2 &+ 4)
        even()
        return (a &+ keys.2, b &+ keys.0 &+ 5)
    }
}

/// NumPy's seeding: words of any number mixed into four, and as many out of these as needed.
struct SeedSequence {
    private var pool: [UInt32]

    init(_ entropy: [UInt32]) {
        var factor: UInt32 = 0x43B0_D7E5
        func hashed(_ value: UInt32) -> UInt32 {
            let mixed = value ^ factor
            factor = factor &* 0x931E_8875
            let out = mixed &* factor
            return out ^ out >> 16
        }
        func mixed(_ x: UInt32, _ y: UInt32) -> UInt32 {
            let out = x &* 0xCA01_F9DD &- y &* 0x4973_F715
            return out ^ out >> 16
        }
        var pool = (0..<4).map { hashed($0 < entropy.count ? entropy[$0] : 0) }
        for source in 0..<4 {
            for target in 0..<4 where target != source {
                pool[target] = mixed(pool[target], hashed(pool[source]))
            }
        }
        for word in entropy.dropFirst(4) {
            for target in 0..<4 { pool[target] = mixed(pool[target], hashed(word)) }
        }
        self.pool = pool
    }

    /// The first `count` words of the sequence.
    func state(_ count: Int) -> [UInt32] {
        var factor: UInt32 = 0x8B51_F9DD
        return (0..<count).map { at in
            let mixed = pool[at % 4] ^ factor
            factor = factor &* 0x58F3_8DED
            let out = mixed &* factor
            return out ^ out >> 16
        }
    }
}
