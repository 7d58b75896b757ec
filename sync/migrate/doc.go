// Package migrate brings a fleet over from stretcher, node by node.
//
//   - Inspect says of one of stretcher's manifests, and of its archive, what a kedge node would do otherwise, and Fix writes
//     the manifest as kedge would have it.
//   - Import copies manifests to keys that don't change, and writes a deployments repo that names them.
//   - Bridge makes of an event, as old deploy scripts send it, what agents follow: a unit's record, or a pin.
//
// Nothing here changes what stretcher reads: its manifests and archives stay as they are, so that every step can be
// taken back.
package migrate
