// Package migrate moves a fleet from stretcher to kedge, node by node.
//
//   - Inspect returns what a kedge node would do differently with one of stretcher's manifests and its archive, and
//     Fix returns the manifest adapted to kedge.
//   - Import copies manifests to keys that don't change, and writes a deployments repo that names them.
//   - Bridge turns an event, as old deploy scripts send it, into a unit's record or a pin, which agents follow.
//
// Nothing here changes what stretcher reads: its manifests and archives stay as they are, so that every step can
// be undone.
package migrate
