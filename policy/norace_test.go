//go:build !race

package policy

const histories = 6000
