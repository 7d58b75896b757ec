//go:build !race

package policy

const histories = 2500
