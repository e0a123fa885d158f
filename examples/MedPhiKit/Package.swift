// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "MedPhiKit",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "Phi3Core", targets: ["Phi3Core"]),
        .library(name: "Phi3Reference", targets: ["Phi3Reference"]),
    ],
    targets: [
        .target(name: "Phi3Core"),
        .target(name: "Phi3Reference", dependencies: ["Phi3Core"]),
        .testTarget(name: "Phi3CoreTests", dependencies: ["Phi3Core"]),
        .testTarget(name: "Phi3ReferenceTests", dependencies: ["Phi3Reference"]),
    ],
    swiftLanguageModes: [.v6]
)
