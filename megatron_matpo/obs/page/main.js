header();
charts();
conversations();
