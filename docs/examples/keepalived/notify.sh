#!/bin/sh
# hypersync runs this as: notify.sh EVENT MEMBER
#
# Beside keepalived it moves nothing: two judges would sooner or later disagree. VRRP sees by itself
# that a gateway is gone, and `hypersync-inspect check` tells keepalived who is ready. What is left is to
# tell people.
event=$1 member=$2
case $event in
member-dead) priority=daemon.crit ;;            # one copy of its connections is left until --reprotect-after
self-not-ready) priority=daemon.warning ;;
*) priority=daemon.notice ;;
esac
logger -p "$priority" -t hypersync "$event $member"
