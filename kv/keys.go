package kv

import "kedge/deployments"

// DefaultPrefix is where kedge's keys lie in Consul KV.
const DefaultPrefix = "kedge/"

// The keys, relative to the store's prefix. DESIGN: one writer a key; kinds come first, so that an ACL can hold
// each party to its own.
const (
	DesiredPrefix = "desired/" // written by the mirror that holds the lease
	PinsPrefix    = "pins/"    // by operators
	ControlPrefix = "control/" // by operators, consumed by the mirror
	StatusPrefix  = "status/"  // by each agent, its own
	HistoryPrefix = "history/" // by the mirror
	MirrorKey     = "mirror/state"
	MirrorLease   = "mirror/lease"
	MirrorHook    = "mirror/hook"
	MirrorPrefix  = "mirror/"
)

func DesiredKey(id deployments.UnitID) string { return DesiredPrefix + id.String() }
func PinKey(id deployments.UnitID) string     { return PinsPrefix + id.String() }
func NodePinKey(id deployments.UnitID, node string) string {
	return PinsPrefix + id.String() + "/" + node
}
func ControlKey(id deployments.UnitID) string { return ControlPrefix + id.String() }
func StatusKey(stage, role, node string) string {
	return StatusPrefix + stage + "/" + role + "/" + node
}
func HistoryPrefixOf(id deployments.UnitID) string { return HistoryPrefix + id.String() + "/" }

// RolePrefix gives the prefix of one role's keys of a kind: RolePrefix(DesiredPrefix, "prod", "web") is desired/prod/web/.
func RolePrefix(kind, stage, role string) string { return kind + stage + "/" + role + "/" }
